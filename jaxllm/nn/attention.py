"""Causal self-attention with grouped queries, over one batch or over a key-value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.kernels.attention import attend, causal_attention
from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.checkpoint_names import named
from jaxllm.nn.context import Context
from jaxllm.nn.linear import Linear
from jaxllm.nn.norm import RMSNorm
from jaxllm.nn.parameter import parameter
from jaxllm.nn.rope import apply_rope


class Attention(nn.Module):
    """Multi-head attention with `heads` query heads and `kv_heads` key and value heads of `head_dim` each.

    fused: whether queries, keys and values come of one matrix `qkv`, whose columns have beside each key head its query
    heads before it and its value head behind it; else of `q`, `k` and `v`. qk_norm_eps: of the norms of the queries and
    keys of each head before they turn; None = there are none.
    spec: what it computes, as far as that is the same in every layer; a window of `ctx` takes the place of its own.
    sinks: whether each query head learns a score that joins the denominator of its softmax.

    Of an adapter it applies the leaves that it finds, and makes none: `prefix_k` and `prefix_v`, `[n, kv_heads ·
    head_dim]`, keys (as after their rotation) and values in front of every row, which all of its tokens see.
    """

    heads: int
    kv_heads: int
    head_dim: int
    stddev: float
    dtype: DTypeLike
    qkv_bias: bool = False
    o_bias: bool = False
    fused: bool = False
    qk_norm_eps: float | None = None
    spec: AttentionSpec = PLAIN
    sinks: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, ctx: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, D]` → `[B, T, D]`, and the cache with this pass's keys and values written into it."""
        batch, length, width = x.shape

        def linear(features: int, axes: tuple[str, str], name: str) -> Linear:
            use_bias = self.o_bias if name == "o" else self.qkv_bias
            return Linear(features, axes, self.dtype, self.stddev, use_bias, name=name)

        parts: dict[str, jax.Array] = {}
        if self.fused:
            of_key = self.heads // self.kv_heads
            y = linear((self.heads + 2 * self.kv_heads) * self.head_dim, ("embed", "kv_heads"), "qkv")(x, ctx)
            y = y.reshape(batch, length, self.kv_heads, of_key + 2, self.head_dim)
            y = ctx.layout.constrain(y, "batch", "act_inner_length", "act_kv_heads", None, None)
            parts |= zip("qkv", jnp.split(y, [of_key, of_key + 1], axis=3), strict=True)

        def heads(count: int, axis: str, name: str) -> jax.Array:
            y = parts[name] if parts else linear(count * self.head_dim, ("embed", axis), name)(x, ctx)
            y = y.reshape(batch, length, count, self.head_dim)
            return ctx.layout.constrain(y, "batch", "act_inner_length", f"act_{axis}", None)

        def turned(count: int, axis: str, name: str) -> jax.Array:
            y = heads(count, axis, name)
            if self.qk_norm_eps is not None:
                y = RMSNorm(self.qk_norm_eps, name=f"{name}_norm")(y)
            return apply_rope(y, ctx.rope)

        q = named(turned(self.heads, "heads", "q"), "attn_q")
        k = named(turned(self.kv_heads, "kv_heads", "k"), "attn_k")
        v = named(heads(self.kv_heads, "kv_heads", "v"), "attn_v")
        spec = self.spec._replace(shared=ctx.shared)
        if ctx.window is not None:
            spec = spec._replace(window=ctx.window)
        if self.sinks:
            sinks = parameter(self, "sinks", nn.initializers.normal(self.stddev), ("heads",), (self.heads,))
            spec = spec._replace(sinks=sinks)
        if cache is None:
            segments, (k, v) = ctx.segments, self._behind_prefix(k, v, ctx)
            spec = spec._replace(prefix=k.shape[1] - length).within(k.shape[1])
            if segments is not None:
                segments = jnp.pad(segments, ((0, 0), (spec.prefix, 0)), constant_values=VIRTUAL)
            y = causal_attention(ctx.attention, q, k, v, segments, ctx.layout, spec)
        else:
            cache = cache.write(k, v, ctx)
            k, v = self._behind_prefix(cache.k, cache.v, ctx)
            spec = spec._replace(prefix=k.shape[1] - cache.k.shape[1]).within(k.shape[1])
            y = attend(q, k, v, cache_mask(ctx, length, spec.prefix), spec, cache_distances(ctx, length, spec))
        y = named(ctx.layout.constrain(y, "batch", "act_inner_length", "act_heads", None), "attn_context")
        y = y.reshape(batch, length, self.heads * self.head_dim)
        return named(linear(width, ("heads", "embed"), "o")(y, ctx), "attn_out"), cache

    def _behind_prefix(self, k: jax.Array, v: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, kv_heads, head_dim]`, behind those of the prefix where there is one."""
        if not self.has_variable("params", "prefix_k"):
            return k, v

        def behind(x: jax.Array, name: str) -> jax.Array:
            prefix = self.get_variable("params", name).astype(x.dtype).reshape(-1, *x.shape[2:])
            x = jnp.concatenate([jnp.broadcast_to(prefix, (len(x), *prefix.shape)), x], axis=1)
            return ctx.layout.constrain(x, "batch", "act_inner_length", "act_kv_heads", None)

        return behind(k, "prefix_k"), behind(v, "prefix_v")


# The segment of virtual tokens, which is no document's.
VIRTUAL = -1


def cache_mask(ctx: Context, length: int, front: int = 0) -> jax.Array:
    """`[B, length, front + S]`: True where one of `length` queries at the cache position of `ctx` may look at a slot.

    That is one of its own segment, and no later one, or one of a virtual token. front: keys before the first slot,
    which all see.
    """
    assert ctx.cache is not None
    offset, segments = ctx.cache.offset, ctx.cache.segments
    query_slots = offset + jnp.arange(length)
    query_segments = jax.lax.dynamic_slice_in_dim(segments, offset, length, axis=1)
    same = query_segments[:, :, None] == segments[:, None, :]
    earlier = query_slots[:, None] >= jnp.arange(segments.shape[1])[None, :]
    mask = (same | (jnp.arange(segments.shape[1]) < ctx.shared)) & earlier
    return jnp.pad(mask, ((0, 0), (0, 0), (front, 0)), constant_values=True)


def cache_distances(ctx: Context, length: int, spec: AttentionSpec) -> jax.Array | None:
    """The distances of `spec` between `length` queries at the cache position of `ctx` and the slots, behind the prefix:
    `[B or 1, length, prefix + S]`. The tokens of a row stand together in the cache."""
    assert ctx.cache is not None
    if not spec.asks_distances:
        return None
    segments = jnp.pad(ctx.cache.segments, ((0, 0), (spec.prefix, 0)), constant_values=VIRTUAL)
    at = spec.prefix + ctx.cache.offset + jnp.arange(length)
    return spec.distances(at, segments, segments.shape[1])
