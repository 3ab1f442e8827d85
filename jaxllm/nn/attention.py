"""Causal self-attention with grouped queries, over one batch or over a key-value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.kernels.attention import attend, causal_attention
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Context
from jaxllm.nn.linear import Linear
from jaxllm.nn.named import named
from jaxllm.nn.rope import apply_rope


class Attention(nn.Module):
    """Multi-head attention with `heads` query heads and `kv_heads` key and value heads of `head_dim` each."""

    heads: int
    kv_heads: int
    head_dim: int
    use_bias: bool
    stddev: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: jax.Array, ctx: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, D]` → `[B, T, D]`, and the cache with this pass's keys and values written into it."""
        batch, length, width = x.shape

        def linear(features: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear(features, axes, self.dtype, self.stddev, self.use_bias, name=name)

        def heads(count: int, axis: str, name: str) -> jax.Array:
            y = linear(count * self.head_dim, ("embed", axis), name)(x, ctx)
            y = y.reshape(batch, length, count, self.head_dim)
            return ctx.layout.constrain(y, "batch", "act_inner_length", f"act_{axis}", None)

        q = named(apply_rope(heads(self.heads, "heads", "q"), ctx.rope), "attn_q")
        k = named(apply_rope(heads(self.kv_heads, "kv_heads", "k"), ctx.rope), "attn_k")
        v = named(heads(self.kv_heads, "kv_heads", "v"), "attn_v")
        if cache is None:
            y = causal_attention(ctx.attention, q, k, v, ctx.segments, ctx.layout)
        else:
            cache = cache.write(k, v, ctx)
            y = attend(q, cache.k, cache.v, cache_mask(ctx, length))
        y = named(ctx.layout.constrain(y, "batch", "act_inner_length", "act_heads", None), "attn_context")
        y = y.reshape(batch, length, self.heads * self.head_dim)
        return named(linear(width, ("heads", "embed"), "o")(y, ctx), "attn_out"), cache


def cache_mask(ctx: Context, length: int) -> jax.Array:
    """`[B, length, S]`: True where one of `length` queries at the cache position of `ctx` may look at a slot: one of
    its own segment, and no later one."""
    assert ctx.cache is not None
    offset, segments = ctx.cache.offset, ctx.cache.segments
    query_slots = offset + jnp.arange(length)
    query_segments = jax.lax.dynamic_slice_in_dim(segments, offset, length, axis=1)
    same = query_segments[:, :, None] == segments[:, None, :]
    earlier = query_slots[:, None] >= jnp.arange(segments.shape[1])[None, :]
    return same & earlier
