"""A sharded trainer of large language models on GPUs, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm import optim as optim
    from jaxllm.core.mesh import Layout as Layout
    from jaxllm.core.mesh import MeshConfig as MeshConfig
    from jaxllm.hf import load_hf as load_hf
    from jaxllm.hf import save_hf as save_hf

# Read at first use, so that a command can set up JAX (devices, memory, processes) before anything imports it.
_HOMES = {
    "Layout": "jaxllm.core.mesh",
    "MeshConfig": "jaxllm.core.mesh",
    "load_hf": "jaxllm.hf",
    "save_hf": "jaxllm.hf",
}

__all__ = ["Layout", "MeshConfig", "load_hf", "optim", "save_hf"]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("jaxllm.optim")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
