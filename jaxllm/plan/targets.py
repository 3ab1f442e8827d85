"""GPUs that a program can be compiled for while none is there."""

from collections.abc import Sequence
from typing import Any

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.core.hardware import TARGETS, Target
from jaxllm.processes.environment import installed

# What compiling for a GPU takes beside jax: the extra [plan], or what [cuda13] brings.
WHEELS = (
    ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
    ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"),
)
# GPUs of a machine.
HOST = 8


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
