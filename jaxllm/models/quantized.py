"""A model whose layers have their matrices in 4 or 8 bits, which do not train."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import tree
from jaxllm.core.config import Section
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.nn.quantized import BLOCK, NESTED_BLOCK, quantize_int8, quantize_nf4, quantize_scales, stored_axes

Leaf = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Quantization:
    """How the matrices of the layers are stored. double: whether the scales of NF4 are quantised too.

    Embedding, norms, biases and the head stay as they are.
    """

    kind: Literal["nf4", "int8"]
    double: bool

    def __str__(self) -> str:
        return f"{self.kind}{' with double quantisation' if self.kind == 'nf4' and self.double else ''}"

    @staticmethod
    def replaces(path: str) -> bool:
        """Whether the parameter at `path` is stored in other leaves."""
        return path.startswith("layers/") and path.endswith("/kernel")

    def stored(self, path: str, shape: tuple[int, ...]) -> dict[str, Leaf]:
        """The leaves in place of the stack of matrices `[L, in, out]` at `path`, by their names.

        Raises UserError for a matrix that the blocks of NF4 do not divide.
        """
        layers, width, out = shape
        if self.kind == "int8":
            leaves = {"int8": ((width, out), jnp.int8), "int8_scale": ((out,), jnp.float32)}
        else:
            if width % BLOCK:
                raise UserError(
                    f"model.quantize is nf4, whose blocks are {BLOCK} weights of one row, and {path} has rows of "
                    f"{width}, which {BLOCK} does not divide; set it to int8, whose rows may have any length"
                )
            leaves = {
                "nf4": ((width // 2, out), jnp.uint8),
                "nf4_scale": ((width // BLOCK, out), jnp.uint8 if self.double else jnp.float32),
            }
            if self.double:
                blocks = width // BLOCK * out
                leaves |= {"nf4_nested": ((-(-blocks // NESTED_BLOCK),), jnp.float32), "nf4_offset": ((), jnp.float32)}
        return {name: Leaf((layers, *shape), dtype) for name, (shape, dtype) in leaves.items()}

    def replaced(self, shapes: Params, axes: Params, layout: Layout) -> tuple[Params, Params]:
        """The shapes of a model's parameters, and the names of their axes, as they are stored."""
        found: dict[str, Any] = {}
        for path, leaf in tree.flatten(shapes).items():
            names = tree.at(axes, path)
            if not self.replaces(path):
                found[path] = leaf, names
                continue
            folder = path.rpartition("/")[0]
            for name, stored in self.stored(path, leaf.shape).items():
                own = stored_axes(name, stored.shape[1:], names[1:], layout)
                found[f"{folder}/{name}"] = stored, (names[0], *own)
        leaves = {path: leaf for path, (leaf, _) in found.items()}
        return tree.insert({}, leaves), tree.insert({}, {path: names for path, (_, names) in found.items()})

    def quantized(self, layers: Iterable[jax.Array], wanted: Mapping[str, Leaf]) -> dict[str, jax.Array]:
        """The leaves `wanted`, by their names, of matrices `[in, out]`, one a layer, of which one at a time exists."""
        laid: Any = wanted[self.kind].sharding
        codes = jnp.zeros(wanted[self.kind].shape, wanted[self.kind].dtype, device=laid)
        everywhere = jax.sharding.NamedSharding(laid.mesh, jax.sharding.PartitionSpec())

        @partial(jax.jit, donate_argnums=0, out_shardings=(laid, everywhere))
        def store(codes: jax.Array, kernel: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            of_layer = quantize_int8(kernel) if self.kind == "int8" else quantize_nf4(kernel)
            changed = jax.lax.dynamic_update_index_in_dim(codes, of_layer[self.kind], i, 0)
            return changed, of_layer[f"{self.kind}_scale"]

        others: list[Mapping[str, np.ndarray]] = []
        for i, kernel in enumerate(layers):
            codes, scale = store(codes, kernel, np.int32(i))
            scale = np.asarray(scale.addressable_data(0))
            doubled = self.kind == "nf4" and self.double
            others.append(quantize_scales(scale) if doubled else {f"{self.kind}_scale": scale})
        leaves = {self.kind: codes}
        for name in others[0]:
            stack = np.stack([one[name] for one in others])
            leaves[name] = jax.make_array_from_callback(stack.shape, wanted[name].sharding, stack.__getitem__)
        return leaves


class Quantizable(Section):
    """How a pretrained model is stored."""

    quantize: Literal["nf4", "int8"] | None = None
    """what the matrices of the layers are stored in, beside which an adapter trains: nf4 (4 bits, QLoRA: Dettmers et
    al., arXiv 2305.14314) or int8; default: param_dtype"""
    double_quant: bool = True
    """whether the scales of nf4, one for 64 weights, are stored in 8 bits"""

    @property
    def quantization(self) -> Quantization | None:
        """How the matrices of the layers are stored; None = as they are."""
        return None if self.quantize is None else Quantization(self.quantize, self.double_quant)
