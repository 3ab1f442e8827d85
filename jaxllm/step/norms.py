"""Norms of gradients and parameters, of all leaves together and by group."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32


def squares(params: Any) -> dict[str, jax.Array]:
    """By the path of each leaf, the sum of the squares of its entries, in at least float32."""
    return {path: jnp.sum(jnp.square(_wide(leaf))) for path, leaf in tree.flatten(params).items()}


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(at_least_float32(leaf.dtype))


def norms(name: str, squares: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The Euclidean norm of all leaves, `name`, and `{"name/group": norm}` over all layers together.

    squares: of the leaves, by their paths. The groups are `embed`, `head`, `norms` (all of them), and the parts of a
    block, such as `attn` and `mlp`.
    """
    groups: defaultdict[str, list[jax.Array]] = defaultdict(list)
    for path, square in squares.items():
        groups[name].append(square)
        groups[f"{name}/{group_of(path)}"].append(square)
    return {group: jnp.sqrt(sum(of_group, jnp.zeros(()))) for group, of_group in groups.items()}


def group_of(path: str) -> str:
    """The group of the parameter at `path`, such as `layers/attn/q/kernel`."""
    parts = path.split("/")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    return parts[1] if parts[0] == "layers" else parts[0]
