"""What every block of a model sees besides its parameters and its input."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.mesh import Layout
from jaxllm.kernels.attention import AttentionForm
from jaxllm.nn.dropout import Dropout


class LayerData(NamedTuple):
    """What differs between the layers of a run of equal blocks, `[L]` int32 each; None where nothing does.

    window: how many tokens a token sees, itself one of them. rope: which table of rotation angles a layer uses.
    """

    window: jax.Array | None = None
    rope: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """One batch's side of a forward pass: a tree whose arrays begin with B, apart from `cache` and what is of layers.

    layout: where activations live.
    rope: cosines and sines of the rotation angles, `[B, T, head_dim / 2]` each.
    segments: `[B, T]` int32, which document each token belongs to, 0 for padding; None = one document a row.
        A token attends to earlier tokens of its own segment.
    attention: how attention is computed; with a cache it is always the plain form.
    cache: where a decoding pass stands in the key-value cache; None outside decoding.
    dropout: of the embedding and of what each sublayer adds to the residual stream; None = nothing is dropped.
    adapter_dropout: of what the low-rank part of an adapter is given.
    shared: how many keys in front of a row are those of virtual tokens, which every later query sees, whatever its
        segment. begins: whether this pass has their queries; false where they are in the cache already.
    layers: what differs between the layers; None = nothing. `of_layer` takes one layer's part of it:
    window, rope_index: scalar int32, the layer's `LayerData`.
    """

    layout: Layout = field(metadata={"static": True})
    rope: tuple[jax.Array, jax.Array]
    segments: jax.Array | None = None
    attention: AttentionForm = field(default="xla", metadata={"static": True})
    cache: "CachePosition | None" = None
    dropout: Dropout | None = None
    adapter_dropout: Dropout | None = None
    shared: int = field(default=0, metadata={"static": True})
    begins: bool = field(default=True, metadata={"static": True})
    layers: LayerData | None = None
    window: jax.Array | None = None
    rope_index: jax.Array | None = None

    def of_layer(self, index: jax.Array) -> "Context":
        """The context of one layer, with its own dropout and its own `LayerData`. index: scalar int32."""

        def own(dropout: Dropout | None) -> Dropout | None:
            return None if dropout is None else dropout.at(1 + index)

        data = jax.tree.map(lambda of_layers: of_layers[index], self.layers or LayerData())
        return replace(
            self,
            dropout=own(self.dropout),
            adapter_dropout=own(self.adapter_dropout),
            layers=None,
            window=data.window,
            rope_index=data.rope,
        )

    def in_parts(self, parts: int, split: Callable[[jax.Array], jax.Array]) -> "Context":
        """The contexts of `parts` of the batch, one behind the other along a new leading axis.

        split: does that to an array of the batch. Every part gets the data of all layers.
        """
        layers = jax.tree.map(lambda a: jnp.broadcast_to(a, (parts, *a.shape)), self.layers)
        return replace(jax.tree.map(split, replace(self, layers=None)), layers=layers)

    def drop(self, x: jax.Array, place: int = 0) -> jax.Array:
        """`x` after dropout. place: which of the layer's outputs it is."""
        return x if self.dropout is None else self.dropout.at(place)(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CachePosition:
    """Where the T tokens of this pass stand in a cache of S slots.

    offset: scalar int32, the slot of the first of them.
    segments: `[B, S]` int32, the segment of each slot, those of this pass included; 0 = padding or still empty.
    """

    offset: jax.Array
    segments: jax.Array
