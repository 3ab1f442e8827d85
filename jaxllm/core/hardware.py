"""GPUs by the figures of their vendor: peak rates, memory, and what XLA is told to compile for one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.core.mesh import Layout  # imports JAX, which the help of a command does without

GIB, KIB, MIB = 2**30, 2**10, 2**20

# The CUDA and cuDNN that a program is compiled against.
CUDA, CUDNN = "12.9.0", (9, 10, 0)

# Peaks of bf16 products accumulated in float32, without sparsity, in FLOP/s, from the vendor's data sheets. The first
# whose words are in the device's name counts, so the variants of a card stand before it.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


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


def peak_flops(layout: Layout) -> float | None:
    """The dense bf16 peak of all devices together in FLOP/s, or None if it is not known."""
    devices = layout.mesh.devices
    kind = devices.flat[0].device_kind
    known = (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", kind))
    return next((peak * devices.size for peak in known), None)
