"""Matrices of low rank beside those of the layers: the leaves of LoRA, and the parts of them that its files have.

Beside a matrix `[in, out]` of each of L layers stand `lora_a` `[L, in, r]`, `lora_b` `[L, r, out]`, `lora_scale` `[L]`,
for DoRA `lora_magnitude` `[L, out]`, and for PiSSA `lora_a_start` and `lora_b_start`; `nn.linear.Linear` says what they
compute. Where layers differ in rank, the columns and rows beyond a layer's own are zero, and stay so since their
gradients are; a layer without an adapter has the scale 0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.nn.quantized import STORED, kernel_of
from jaxllm.peft.files import PREFIX, Part
from jaxllm.peft.modules import Module

Draw = Callable[[jax.Array, Params], jax.Array]

# The leaves that a matrix may be stored in.
MATRIX = ("kernel", *STORED)


@dataclass(frozen=True)
class LowRank:
    """The adapter of a matrix: the rank and the scale of each layer, 0 in layers without one.

    The embedding and the head, which are in no layer, have one of each; `parts` and `leaves` then have no axis of
    layers.
    """

    module: Module
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def leaves(self, lm: LM, magnitude: bool = False, principal: bool = False) -> dict[str, ExtraLeaf]:
        """The leaves of the adapter, by their paths; with that of DoRA if `magnitude`, with those of PiSSA if
        `principal`."""
        path, in_table = self.module.path, self.module.is_embedding
        kernel = tree.at(lm.abstract(), path)
        width, out = kernel.shape[-2:]
        *layers, of_input, of_output = tree.at(lm.axes(), path)
        dtype, most = at_least_float32(kernel.dtype), max(self.ranks)
        ranks, scales = jnp.array(self.ranks), jnp.array(self.scales, dtype)
        if principal and in_table:
            raise UserError(
                f"peft.init_lora_weights is pissa, whose start HF peft has for linear layers alone, and target_modules "
                f"means {self.module.short}; leave it out, or set init_lora_weights to true"
            )
        if principal and most > min(width, out):
            raise UserError(
                f"peft.init_lora_weights is pissa, and the rank {most} of {self.module.short} is above "
                f"{min(width, out)}, that of the matrix; set r to that at the most"
            )

        def a(key: jax.Array, params: Params) -> jax.Array:
            if in_table:  # as in HF PEFT, where it is lora_b that is drawn
                return jnp.zeros((1, len(tree.at(params, path)), most), dtype)
            # torch's default of a linear layer (Kaiming's uniform with a = √5), as in HF PEFT
            bound = 1 / math.sqrt(width)
            drawn = jax.random.uniform(key, (len(self.ranks), width, most), dtype, -bound, bound)
            return jnp.where(jnp.arange(most) < ranks[:, None, None], drawn, 0)

        def b(key: jax.Array, params: Params) -> jax.Array:
            if in_table:
                return jax.random.normal(key, (1, most, out), dtype)
            columns = tree.at(params, path).shape[-1] if self.module.is_outer else out  # as the vocabulary is padded
            return jnp.zeros((len(self.ranks), most, columns), dtype)

        def halves(params: Params) -> tuple[jax.Array, jax.Array]:
            a, b = jax.lax.map(
                lambda one: principal_halves(one, most), self._stack(tree.at(params, path)).astype(dtype)
            )
            own = jnp.arange(most) < ranks[:, None]
            root = jnp.sqrt(jnp.where(scales > 0, scales, 1))[:, None, None]
            return jnp.where(own[:, None], a / root, 0), jnp.where(own[..., None], b / root, 0)

        def norms(_: jax.Array, params: Params) -> jax.Array:
            folder = tree.at(params, self.module.folder)
            stored = (
                {"kernel": folder["table"]} if in_table else {name: folder[name] for name in MATRIX if name in folder}
            )
            stacks = {name: self._stack(leaf) for name, leaf in stored.items()}
            of_layers = jax.lax.map(lambda one: jnp.linalg.norm(kernel_of(one).astype(dtype), axis=0), stacks)
            return jnp.where(ranks[:, None] > 0, of_layers, 0)

        def leaf(axes: tuple[str | None, ...], draw: Draw, frozen: bool = False) -> ExtraLeaf:
            vocab_axis = axes.index("vocab") if "vocab" in axes else None
            if self.module.stacked:
                return ExtraLeaf((*layers, *axes), draw, frozen, vocab_axis)
            return ExtraLeaf(axes, lambda key, params: draw(key, params)[0], frozen, vocab_axis)

        axes_a, axes_b = (of_input, "rank"), ("rank", of_output)
        leaves = {
            "lora_a": leaf(axes_a, a),
            "lora_b": leaf(axes_b, b),
            "lora_scale": leaf((), lambda *_: scales, frozen=True),
        }
        if principal:
            for end, frozen in (("", False), ("_start", True)):
                leaves[f"lora_a{end}"] = leaf(axes_a, lambda _, params: halves(params)[0], frozen)
                leaves[f"lora_b{end}"] = leaf(axes_b, lambda _, params: halves(params)[1], frozen)
        if magnitude:
            leaves["lora_magnitude"] = leaf((of_output,), norms)
        return {f"{self.module.folder}/{name}": leaf for name, leaf in leaves.items()}

    def _stack(self, leaf: jax.Array) -> jax.Array:
        """A leaf beside the kernel with an axis of layers, which those outside of the layers have not."""
        return leaf if self.module.stacked else leaf[None]

    def parts(self, lm: LM, magnitude: bool = False, principal: bool = False) -> Iterator[Part]:
        """The tensors of each layer with an adapter. Those of PiSSA also have what was taken away at the start.

        Where the embedding is the head too, the files have the adapter beside both.
        """
        module, c = self.module, lm.config
        width, out = tree.at(lm.abstract(), module.path).shape[-2:]
        if module.is_embedding:
            width = c.vocab_size
        elif module.is_outer:
            out = c.vocab_size
        rows, columns, of_output = slice(width), slice(out), module.operation.order
        of_a, of_b = (f"lora_{'embedding_' if module.is_embedding else ''}{name}" for name in "AB")
        weight = "" if module.is_embedding else ".weight"
        ends = ("", "_start") if principal else ("",)
        for i, rank in enumerate(self.ranks):
            if not rank:
                continue
            layer, name = (i,) if module.stacked else (), f"{PREFIX}{module.names[i]}"
            whole = rank * len(ends)
            for number, end in enumerate(ends):
                path_a, path_b = (f"{module.folder}/lora_{half}{end}" for half in "ab")
                place_a, place_b = (*layer, rows, slice(rank)), (*layer, slice(rank), columns)
                ranks, every = slice(number * rank, (number + 1) * rank), slice(None)
                within_a, within_b = (ranks, every), (every, ranks)
                yield Part(path_a, place_a, f"{name}.{of_a}{weight}", (whole, width), True, within=within_a)
                yield Part(path_b, place_b, f"{name}.{of_b}{weight}", (out, whole), True, of_output, within_b)
                if module.alias:
                    alias = f"{PREFIX}{module.alias}"
                    yield Part(path_b, place_b, f"{alias}.lora_A.weight", (whole, out), within=within_a)
                    yield Part(path_a, place_a, f"{alias}.lora_B.weight", (width, whole), within=within_b)
            if magnitude:
                path, tensor = f"{module.folder}/lora_magnitude", f"{name}.lora_magnitude_vector"
                yield Part(path, (*layer, columns), tensor, (out,), order=of_output)


def principal_halves(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`a` `[in, rank]` and `b` `[rank, out]`, whose product is the part of `kernel` `[in, out]` with the largest
    singular values, each of which is shared between both by its root (Meng et al., arXiv 2404.02948, eq. 2 and 3)."""
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]
