"""Matrices of low rank beside those of the layers: what their methods have in common, and the leaves of LoRA.

Beside a matrix `[in, out]` of each of L layers stand `lora_a` `[L, in, r]`, `lora_b` `[L, r, out]`, `lora_scale` `[L]`,
for DoRA `lora_magnitude` `[L, out]`, and for PiSSA `lora_a_start` and `lora_b_start`; `nn.linear.Linear` says what they
compute. Where layers differ in rank, the columns and rows beyond a layer's own are zero, and stay so since their
gradients are; a layer without an adapter has the scale 0.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeInt, model_validator

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.nn.quantized import STORED, kernel_of
from jaxllm.peft.files import Part
from jaxllm.peft.modules import Module, modules
from jaxllm.peft.targets import ALL_LINEAR, Targeted, shown

# What float32 holds, multiplied by a weight and divided by the root of a rank.
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
# Above the width of any matrix it is for.
Rank = Annotated[int, Field(ge=1, le=2**16)]

Draw = Callable[[jax.Array, Params], jax.Array]

# The leaves that a matrix may be stored in.
MATRIX = ("kernel", *STORED)

# Of what PiSSA takes away at the start, in the place of a file's own end of a name; no file has it.
START = ".start"


class LowRank(Targeted):
    """What the methods have that put matrices of low rank beside those of the layers. Names are those of HF PEFT."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """share of their input that is dropped in training"""
    layers_to_transform: tuple[NonNegativeInt, ...] | None = None
    """the layers that get them, counted from 0; default: all"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """the biases that train: none, all of the model, or those of the matrices with an adapter"""

    @model_validator(mode="after")
    def _layers_of_names(self) -> "LowRank":
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR and self.layers_to_transform:
            raise ValueError(
                f"layers_to_transform goes with a list of names, and target_modules is {shown(self.target_modules)}, a "
                "regular expression; write the layers into it, or give a list"
            )
        return self

    @classmethod
    def section(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        layers = raw.get("layers_to_transform")
        return super().section({**raw, "layers_to_transform": [layers] if type(layers) is int else layers})

    def is_in_layer(self, module: Module, layer: int) -> bool:
        # As in HF PEFT: no layers mean all, and a whole name means its matrix, whatever the layers are, as does the
        # name of an embedding that is the head too.
        if not self.layers_to_transform or module.names[layer] in self.target_modules or module.alias:
            return True
        return module.stacked and layer in self.layers_to_transform

    def target_layers(self, lm: LM) -> list[tuple[Module, tuple[bool, ...]]]:
        count = lm.config.num_hidden_layers
        if too_deep := [i for i in self.layers_to_transform or () if i >= count]:
            raise UserError(f"peft.layers_to_transform names layer {too_deep[0]}, and the model has 0 to {count - 1}")
        return super().target_layers(lm)

    def whole(self, lm: LM) -> set[str]:
        paths = super().whole(lm)
        if self.bias != "none":
            targets, every = self.target_layers(lm), modules(lm)
            partly = [module.short for module, layers in targets if not all(layers)]
            if partly and self.bias == "lora_only":
                raise UserError(
                    f"peft.bias is lora_only, and {partly[0]} has an adapter in some layers only, while its biases "
                    "train in all; set bias to all or none"
                )
            beside = {module.folder for module, _ in targets}
            biases = {m.path for m in every if m.kind == "bias" and (self.bias == "all" or m.folder in beside)}
            if not biases:
                raise UserError(f"peft.bias is {self.bias}, and the model has no such bias; set it to none")
            paths |= biases
        return paths

    def description(self, lm: LM) -> dict[str, Any]:
        return {
            **super().description(lm),
            "lora_dropout": self.lora_dropout,
            "ensure_weight_tying": self.changes_tied(lm),
        }


@dataclass(frozen=True)
class Target:
    """A matrix with an adapter: the rank and the scale of each layer, 0 in layers without one.

    The embedding and the head, which are in no layer, have one of each; `parts` and `leaves` then have no axis of
    layers.
    """

    module: Module
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def leaves(self, lm: LM, magnitude: bool, principal: bool = False) -> dict[str, ExtraLeaf]:
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

    def parts(self, lm: LM, magnitude: bool, principal: bool = False) -> Iterator[Part]:
        """The tensors of each layer with an adapter, by the module's name. The tensors of PiSSA's start have START.

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
        for i, rank in enumerate(self.ranks):
            if not rank:
                continue
            layer, name = (i,) if module.stacked else (), module.names[i]
            ends = {"": (of_a + weight, of_b + weight)}
            if principal:
                ends["_start"] = (of_a + START, of_b + START)
            for end, (name_a, name_b) in ends.items():
                path_a, path_b = (f"{module.folder}/lora_{half}{end}" for half in "ab")
                place_a, place_b = (*layer, rows, slice(rank)), (*layer, slice(rank), columns)
                yield Part(path_a, place_a, f"{name}.{name_a}", (rank, width), True)
                yield Part(path_b, place_b, f"{name}.{name_b}", (out, rank), True, of_output)
                if module.alias:
                    yield Part(path_b, place_b, f"{module.alias}.lora_A.weight", (rank, out))
                    yield Part(path_a, place_a, f"{module.alias}.lora_B.weight", (width, rank))
            if magnitude:
                path, tensor = f"{module.folder}/lora_magnitude", f"{name}.lora_magnitude_vector"
                yield Part(path, (*layer, columns), tensor, (out,), order=of_output)


def principal_halves(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`a` `[in, rank]` and `b` `[rank, out]`, whose product is the part of `kernel` `[in, out]` with the largest
    singular values, each of which is shared between both by its root (Meng et al., arXiv 2404.02948, eq. 2 and 3)."""
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]
