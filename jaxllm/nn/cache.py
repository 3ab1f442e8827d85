"""The key-value cache of decoding: arrays of a fixed size, so that no step of a generation compiles anew."""

from typing import NamedTuple

import jax

from jaxllm.nn.context import Context


class LayerCache(NamedTuple):
    """Keys (after rotation) and values of one layer, `[B, S, kv_heads, head_dim]` each.

    Stacked over the layers, both have a leading axis.
    """

    k: jax.Array
    v: jax.Array

    def write(self, k: jax.Array, v: jax.Array, ctx: Context) -> "LayerCache":
        """The cache with the keys and values `[B, T, …]` of this pass in their slots."""
        assert ctx.cache is not None
        write, offset = jax.lax.dynamic_update_slice_in_dim, ctx.cache.offset
        return LayerCache(
            write(self.k, k.astype(self.k.dtype), offset, axis=1),
            write(self.v, v.astype(self.v.dtype), offset, axis=1),
        )
