"""What a command says of its process before it imports anything large."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any, cast

# Of a GPU's memory, what a training run takes for itself: a context, its libraries and NCCL live in the rest. JAX's
# own default leaves a quarter to other programs.
GPU_MEMORY_SHARE = 0.92

# Of each of XLA:CPU's thread pools, for a simulated device: the launch of its next program may hold one while others
# wait in collectives, one inside a loop and one beside it; the fourth goes on with what they wait for.
THREADS_PER_SIMULATED_DEVICE = 4


def prepare_backends() -> None:
    """What every command that computes says before JAX makes its backends."""
    without_idle_cuda()
    with_threads_for_simulated_devices()


def without_torch() -> None:
    """Makes `import torch` fail in this process, as where it is not installed.

    transformers, of which we use the tokenizers alone, imports torch where it finds it: two more seconds at each
    start, a second runtime on the GPU, and an error where torch is damaged.
    """
    cast(dict[str, Any], sys.modules)["torch"] = None  # Python's own mark of a module that is not there


def without_idle_cuda() -> None:
    """Hides CUDA's plugin from JAX where CUDA's driver is not: there it is to compile with, for `jaxllm.plan`.

    JAX would load half a gigabyte at each start, and say with a traceback that it finds no driver.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        for version in ("cuda12", "cuda13"):
            plugin = ModuleType(f"jax_plugins.xla_{version}")
            plugin.__dict__["initialize"] = lambda: None
            cast(dict[str, Any], sys.modules).update({plugin.__name__: plugin, f"jax_{version}_plugin": None})


def with_threads_for_simulated_devices() -> None:
    """Gives XLA:CPU threads enough for the simulated devices that the environment asks for.

    On its own it has a thread for each device or core, and a thread that waits in a collective is not there for
    others: where each is held so, by seven devices that wait for the eighth, the run stands still, and after a while
    XLA aborts it.
    """
    flag = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(flag[-1] if flag else os.environ.get("JAX_NUM_CPU_DEVICES", "1"))
    if devices > 1:
        threads = max(THREADS_PER_SIMULATED_DEVICE * devices, os.cpu_count() or 1)
        os.environ.setdefault("PJRT_NPROC", str(threads))


def installed(package: str) -> bool:
    """Whether a package of that name is installed; it is not imported."""
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drops what is written to the standard error meanwhile, by libraries that know no other way to say it too."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
