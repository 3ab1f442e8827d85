"""GPUs that a program can be compiled for while none is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.processes.environment import installed

GIB, KIB, MIB = 2**30, 2**10, 2**20

# What compiling for a GPU takes beside jax: the extra [plan], or what [cuda13] brings.
WHEELS = (
    ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
    ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"),
)
# The CUDA and cuDNN that a program is compiled against.
CUDA, CUDNN = "12.9.0", (9, 10, 0)
# GPUs of a machine.
HOST = 8


@dataclass(frozen=True)
class Target:
    """A GPU by the figures of NVIDIA's data sheets, architecture whitepapers and CUDA programming guide.

    name: as the driver gives it. capability: compute capability. multiprocessors: with `lanes` float32 units each,
    at `boost_ghz`. shared_kib: shared memory of a multiprocessor, of which a block may have all but 1 KiB.
    memory_gib: what CUDA has of the nominal gigabytes, as `nvidia-smi` and frameworks report it.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    boost_ghz: float
    bandwidth_tb_s: float
    l2_mib: int
    shared_kib: int
    memory_gib: float

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    def description(self) -> str:
        """The text form of XLA's `GpuTargetConfigProto`."""
        major, minor = self.capability
        dnn_major, dnn_minor, dnn_patch = CUDNN
        features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.lanes}
  clock_rate_ghz: {self.boost_ghz}
  memory_bandwidth: {int(self.bandwidth_tb_s * 1e12)}
  device_memory_size: {self.memory_bytes}
  l2_cache_size: {self.l2_mib * MIB}
  shared_memory_per_core: {self.shared_kib * KIB}
  shared_memory_per_block_optin: {(self.shared_kib - 1) * KIB}
  shared_memory_per_block: {48 * KIB}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  runtime_version: "{CUDA}"
  driver_version: "{CUDA}"
  compile_time_toolkit_version: "{CUDA}"
  dnn_version: "{dnn_major}.{dnn_minor}.{dnn_patch}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn_major} minor: {dnn_minor} patch: {dnn_patch} }}
device_description_str: "{self.name}"
"""


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 3.35, 50, 228, 79.1),
    "h200": Target("NVIDIA H200", (9, 0), 132, 128, 1.98, 4.8, 50, 228, 139.8),
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2.04, 40, 164, 79.2),
}


def target_named(name: str) -> Target:
    """The target `name`. Raises UserError with the nearest."""
    if name not in TARGETS:
        raise UserError(
            f"--gpu {name}: no such GPU is described.{did_you_mean(name, TARGETS)} Known: {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def missing_wheels() -> list[str]:
    """What of the extra [plan] is not installed; nothing where another of WHEELS is there."""
    missing = [[wheel for wheel in wheels if not installed(wheel)] for wheels in WHEELS]
    return min(missing, key=bool)


def compile_only_devices(target: Target, count: int) -> Sequence[Any]:
    """`count` devices, eight on a host, that programs can be compiled for, and nothing be run on."""
    from jax.experimental import topologies  # not at the top: the names of the targets are part of the help

    hosts, each = (count // HOST, HOST) if count % HOST == 0 else (1, count)
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target.description(), topology=f"1x{hosts}x{each}"
    )
    return list(described.devices)
