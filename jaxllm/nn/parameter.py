"""Declaring a parameter with the logical names of its axes."""

from typing import Any

import flax.linen as nn
import jax
from flax.typing import Initializer


def parameter(
    module: nn.Module, name: str, initializer: Initializer, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """The parameter `name` of `module`, of `shape`, one name in `axes` for each dimension."""
    value: Any = module.param(name, nn.with_logical_partitioning(initializer, axes), shape)
    return value
