"""Matrices of low rank beside those of the layers: their leaves, and the model without them.

Beside a matrix `[in, out]` of each of L layers stand `lora_a` `[L, in, r]`, `lora_b` `[L, r, out]`, `lora_scale` `[L]`
and, for DoRA, `lora_magnitude` `[L, out]`; `nn.linear.Linear` says what they compute. Where layers differ in rank, the
columns and rows beyond a layer's own are zero, and stay so since their gradients are; a layer without an adapter has
the scale 0.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Params
from jaxllm.models.base import LM, ExtraLeaf
from jaxllm.nn.linear import ADAPTER, merged_kernel
from jaxllm.peft.modules import Module

# By the leaf, the end of the name that HF PEFT gives to a layer's part of it.
ENDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True)
class Target:
    """A matrix with an adapter: the rank and the scale of each layer, 0 in layers without one."""

    module: Module
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def leaves(self, lm: LM, magnitude: bool) -> dict[str, ExtraLeaf]:
        """The leaves of the adapter, by their paths; with that of DoRA if `magnitude`."""
        path = self.module.path
        kernel = tree.at(lm.abstract(), path)
        _, width, out = kernel.shape
        layers, of_input, of_output = tree.at(lm.axes(), path)
        dtype, most = at_least_float32(kernel.dtype), max(self.ranks)
        ranks, scales = jnp.array(self.ranks), jnp.array(self.scales, dtype)

        def a(key: jax.Array, _: Params) -> jax.Array:
            # torch's default of a linear layer (Kaiming's uniform with a = √5), as in HF PEFT
            bound = 1 / math.sqrt(width)
            drawn = jax.random.uniform(key, (len(self.ranks), width, most), dtype, -bound, bound)
            return jnp.where(jnp.arange(most) < ranks[:, None, None], drawn, 0)

        def norms(_: jax.Array, params: Params) -> jax.Array:
            return jnp.where(ranks[:, None] > 0, jnp.linalg.norm(tree.at(params, path).astype(dtype), axis=1), 0)

        leaves = {
            "lora_a": ExtraLeaf((layers, of_input, "rank"), a),
            "lora_b": ExtraLeaf((layers, "rank", of_output), lambda *_: jnp.zeros((len(self.ranks), most, out), dtype)),
            "lora_scale": ExtraLeaf((layers,), lambda *_: scales),
        }
        if magnitude:
            leaves["lora_magnitude"] = ExtraLeaf((layers, of_output), norms)
        return {f"{self.module.folder}/{name}": leaf for name, leaf in leaves.items()}

    def tensors(self, name: str) -> Iterator[tuple[str, int, tuple[slice, ...]]]:
        """Of the leaf `name`: for each layer with an adapter the tensor's name, the layer, and the slices of its matrix
        that are no padding. The file has the matrix transposed."""
        for i, rank in enumerate(self.ranks):
            if rank:
                part = {"lora_a": (slice(None), slice(rank)), "lora_b": (slice(rank),)}.get(name, ())
                yield f"{self.module.names[i]}.{ENDS[name]}", i, part


def merge(params: Params) -> Params:
    """`params` without the leaves of adapters, and with matrices that do what they did."""
    leaves = tree.flatten(params)
    plain = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] not in ADAPTER}
    for path in plain:
        folder = path.rpartition("/")[0]
        adapter = {name: leaves[f"{folder}/{name}"] for name in ADAPTER if f"{folder}/{name}" in leaves}
        if adapter and path.endswith("/kernel"):
            plain[path] = _merged(plain[path], adapter)
    return tree.insert({}, plain)


def _merged(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    """`merged_kernel` of a stack of layers, one after the other."""
    merge = jax.jit(lambda *stacks: jax.lax.map(lambda one: merged_kernel(*one), stacks), out_shardings=kernel.sharding)
    return merge(kernel, dict(adapter))
