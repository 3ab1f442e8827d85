"""A model without the leaves of an adapter, and with weights that do what both did."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.core import tree
from jaxllm.core.tree import Params
from jaxllm.nn.embed import BESIDE, TOKEN_IDS, TOKEN_ROWS
from jaxllm.nn.linear import ADAPTER, merged_bias, merged_kernel


def merge(params: Params) -> Params:
    """`params` without the leaves of adapters, and with matrices that do what they did."""
    leaves = tree.flatten(params)
    plain = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] not in BESIDE}
    for path in plain:
        folder, _, kind = path.rpartition("/")
        adapter = {name: leaves[f"{folder}/{name}"] for name in ADAPTER if f"{folder}/{name}" in leaves}
        if adapter and kind in ("kernel", "table", "bias"):
            plain[path] = _merged(plain[path], adapter, kind, path.startswith("layers/"))
    if f"embed/{TOKEN_ROWS}" in leaves:
        table, rows, ids = (leaves[f"embed/{name}"] for name in ("table", TOKEN_ROWS, TOKEN_IDS))
        replace = jax.jit(lambda *a: a[0].at[a[2]].set(a[1].astype(a[0].dtype)), out_shardings=table.sharding)
        plain["embed/table"] = replace(table, rows, ids)
    return tree.insert({}, plain)


def _merged(leaf: jax.Array, adapter: Mapping[str, jax.Array], kind: str, stacked: bool) -> jax.Array:
    """`merged_kernel` or `merged_bias`; of a stack of layers, of one after the other."""
    of_layer = merged_bias if kind == "bias" else merged_kernel

    def of_stack(*stacks: Any) -> jax.Array:
        return jax.lax.map(lambda one: of_layer(*one), stacks)

    return jax.jit(of_stack if stacked else of_layer, out_shardings=leaf.sharding)(leaf, dict(adapter))
