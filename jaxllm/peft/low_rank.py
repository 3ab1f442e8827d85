"""Matrices of low rank beside those of the layers: what their methods have in common, and the leaves of LoRA.

Beside a matrix `[in, out]` of each of L layers stand `lora_a` `[L, in, r]`, `lora_b` `[L, r, out]`, `lora_scale` `[L]`,
for DoRA `lora_magnitude` `[L, out]`, and for PiSSA `lora_a_start` and `lora_b_start`; `nn.linear.Linear` says what they
compute. Where layers differ in rank, the columns and rows beyond a layer's own are zero, and stay so since their
gradients are; a layer without an adapter has the scale 0.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeInt, model_validator

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.models.base import LM, ExtraLeaf
from jaxllm.nn.quantized import STORED, kernel_of
from jaxllm.peft.files import Part
from jaxllm.peft.modules import Module, modules
from jaxllm.peft.targets import ALL_LINEAR, Targeted, shown

# What float32 holds, multiplied by a weight and divided by the root of a rank.
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
# Above the width of any matrix it is for.
Rank = Annotated[int, Field(ge=1, le=2**16)]

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

    def is_in_layer(self, name: str, layer: int | None) -> bool:
        # As in HF PEFT: no layers mean all, and a whole name means its matrix, whatever the layers are.
        return not self.layers_to_transform or layer in self.layers_to_transform or name in self.target_modules

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
            "ensure_weight_tying": lm.config.tie_word_embeddings and "embed_tokens" in self.saved(lm),
        }


@dataclass(frozen=True)
class Target:
    """A matrix with an adapter: the rank and the scale of each layer, 0 in layers without one."""

    module: Module
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def leaves(self, lm: LM, magnitude: bool, principal: bool = False) -> dict[str, ExtraLeaf]:
        """The leaves of the adapter, by their paths; with that of DoRA if `magnitude`, with those of PiSSA if
        `principal`."""
        path = self.module.path
        kernel = tree.at(lm.abstract(), path)
        _, width, out = kernel.shape
        layers, of_input, of_output = tree.at(lm.axes(), path)
        dtype, most = at_least_float32(kernel.dtype), max(self.ranks)
        ranks, scales = jnp.array(self.ranks), jnp.array(self.scales, dtype)
        if principal and most > min(width, out):
            raise UserError(
                f"peft.init_lora_weights is pissa, and the rank {most} of {self.module.short} is above "
                f"{min(width, out)}, that of the matrix; set r to that at the most"
            )

        def a(key: jax.Array, _: Params) -> jax.Array:
            # torch's default of a linear layer (Kaiming's uniform with a = √5), as in HF PEFT
            bound = 1 / math.sqrt(width)
            drawn = jax.random.uniform(key, (len(self.ranks), width, most), dtype, -bound, bound)
            return jnp.where(jnp.arange(most) < ranks[:, None, None], drawn, 0)

        def halves(params: Params) -> tuple[jax.Array, jax.Array]:
            stack = tree.at(params, path).astype(dtype)
            a, b = jax.lax.map(lambda one: principal_halves(one, most), stack)
            own = jnp.arange(most) < ranks[:, None]
            root = jnp.sqrt(jnp.where(scales > 0, scales, 1))[:, None, None]
            return jnp.where(own[:, None], a / root, 0), jnp.where(own[..., None], b / root, 0)

        def norms(_: jax.Array, params: Params) -> jax.Array:
            stored = {name: leaf for name, leaf in tree.at(params, self.module.folder).items() if name in MATRIX}
            of_layers = jax.lax.map(lambda one: jnp.linalg.norm(kernel_of(one).astype(dtype), axis=0), stored)
            return jnp.where(ranks[:, None] > 0, of_layers, 0)

        axes_a, axes_b = (layers, of_input, "rank"), (layers, "rank", of_output)
        leaves = {
            "lora_a": ExtraLeaf(axes_a, a),
            "lora_b": ExtraLeaf(axes_b, lambda *_: jnp.zeros((len(self.ranks), most, out), dtype)),
            "lora_scale": ExtraLeaf((layers,), lambda *_: scales, frozen=True),
        }
        if principal:
            for end, frozen in (("", False), ("_start", True)):
                leaves[f"lora_a{end}"] = ExtraLeaf(axes_a, lambda _, params: halves(params)[0], frozen)
                leaves[f"lora_b{end}"] = ExtraLeaf(axes_b, lambda _, params: halves(params)[1], frozen)
        if magnitude:
            leaves["lora_magnitude"] = ExtraLeaf((layers, of_output), norms)
        return {f"{self.module.folder}/{name}": leaf for name, leaf in leaves.items()}

    def parts(self, lm: LM, magnitude: bool, principal: bool = False) -> Iterator[Part]:
        """The tensors of each layer with an adapter, by the module's name; those of PiSSA's start have START."""
        _, width, out = tree.at(lm.abstract(), self.module.path).shape
        of_output = self.module.operation.order
        for i, rank in enumerate(self.ranks):
            if not rank:
                continue
            ends = {"": ("lora_A.weight", "lora_B.weight")}
            if principal:
                ends["_start"] = (f"lora_A{START}", f"lora_B{START}")
            for end, (of_a, of_b) in ends.items():
                for leaf, place, name, shape, order in (
                    ("lora_a", (i, slice(None), slice(rank)), of_a, (rank, width), None),
                    ("lora_b", (i, slice(rank)), of_b, (out, rank), of_output),
                ):
                    path = f"{self.module.folder}/{leaf}{end}"
                    yield Part(path, place, f"{self.module.names[i]}.{name}", shape, True, order)
            if magnitude:
                name = f"{self.module.names[i]}.lora_magnitude_vector"
                yield Part(f"{self.module.folder}/lora_magnitude", (i,), name, (out,), order=of_output)


def principal_halves(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`a` `[in, rank]` and `b` `[rank, out]`, whose product is the part of `kernel` `[in, out]` with the largest
    singular values, each of which is shared between both by its root (Meng et al., arXiv 2404.02948, eq. 2 and 3)."""
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]
