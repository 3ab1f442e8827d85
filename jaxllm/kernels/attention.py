"""Causal self-attention of a batch, in three forms that mean the same."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.mesh import Layout
from jaxllm.kernels.flash_attention import flash_attention

AttentionForm = Literal["xla", "cudnn", "flash"]

# The plain form takes so many queries at a time, or an eighth of the sequence if that is more: each part leaves out
# the keys behind its last query, and more parts cost more to compile than they save.
QUERIES_AT_ONCE, MOST_PARTS = 128, 8


def causal_attention(
    form: AttentionForm,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    layout: Layout,
    shared: int = 0,
) -> jax.Array:
    """`softmax(q kᵀ / sqrt(d)) v` over the earlier keys of each query's segment: `[B, T, H, d]`, as `q`.

    q: `[B, T, H, d]`; k, v: `[B, S, K, d]`, the last T of them where the queries are; query head h reads key head
    h // (H / K). segments: `[B, S]` int32, None = one a row. shared: so many of the first keys are seen by every query
    behind them, whatever its segment. All are laid out by `layout`, the length and the width of a head whole.
    "xla": plain JAX, on any device, in any precision. "cudnn": NVIDIA's kernel, which cannot tell segments apart: it
    wants None. "flash": a kernel of our own that can (interpreted on a CPU, for tests). These two have as many keys as
    queries, and flash none that are shared.
    """
    if form == "xla":
        return plain_attention(q, k, v, segments, shared)
    if k.shape[1] != q.shape[1] or (shared and form == "flash"):
        raise ValueError(f"the attention {form!r} cannot have keys of virtual tokens in front; choose 'xla'")
    if form == "flash":
        interpret = layout.platform == "cpu"
        return _on_each_device(partial(flash_attention, interpret=interpret), q, k, v, segments, layout)
    if segments is not None:
        raise ValueError("cuDNN's attention does not keep documents apart; pass segments=None or choose another form")
    return _on_each_device(lambda q, k, v, _: cudnn_attention(q, k, v), q, k, v, None, layout)


def plain_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None, shared: int = 0
) -> jax.Array:
    """The plain form of `causal_attention`."""
    length = q.shape[1]
    front = k.shape[1] - length
    at_once = max(QUERIES_AT_ONCE, -(-length // MOST_PARTS))

    def part(start: int) -> jax.Array:
        stop = min(start + at_once, length)
        mask = causal_mask(segments, front + start, front + stop, shared)
        return attend(q[:, start:stop], k[:, : front + stop], v[:, : front + stop], mask)

    return jnp.concatenate([part(start) for start in range(0, length, at_once)], axis=1)


def causal_mask(segments: jax.Array | None, start: int, stop: int, shared: int = 0) -> jax.Array:
    """`[B or 1, stop - start, stop]`: True where a query of `start … stop` is the key or a later one of its segment, or
    of the `shared` first keys."""
    earlier = jnp.arange(start, stop)[None, :, None] >= jnp.arange(stop)[None, None, :]
    if segments is None:
        return earlier
    return earlier & ((segments[:, start:stop, None] == segments[:, None, :stop]) | (jnp.arange(stop) < shared))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`softmax(q kᵀ / sqrt(d)) v` for q `[B, T, H, d]` and k, v `[B, S, K, d]`, softmax in at least float32.

    mask: `[B or 1, T, S]` bool, True where a query may look (each must see some key). A masked key gets a weight of
    exactly 0. Query head h reads key head h // (H / K).
    """
    batch, length, heads, width = q.shape
    kv_heads, wide = k.shape[2], at_least_float32(q.dtype)
    by_group = (batch, kv_heads, heads // kv_heads, length)
    # All queries that read a key head are the rows of one matrix.
    rows = q.reshape(batch, length, *by_group[1:3], width).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
    scores = jnp.einsum("bkrd,bskd->bkrs", rows, k, preferred_element_type=wide).reshape(*by_group, -1)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(width), -jnp.inf)
    # The sum of the weights divides their product with v, which is smaller than they are.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    y = jnp.einsum(
        "bkrs,bskd->bkrd",
        weights.astype(v.dtype).reshape(*rows.shape[:3], -1),
        v,
        preferred_element_type=wide,
    ).reshape(*by_group, width)
    y = (y / jnp.sum(weights, axis=-1)[..., None]).astype(v.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's form of `causal_attention`, for one segment a row."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _on_each_device(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    layout: Layout,
) -> jax.Array:
    """`kernel(q, k, v, segments)`, run by each device on its own sequences and heads: the compiler cannot split it."""
    heads, kv_heads = q.shape[2], k.shape[2]
    of_q = layout.spec(("batch", None, "act_heads", None), q.shape, "queries")
    of_kv = layout.spec(("batch", None, "act_kv_heads", None), k.shape, "keys and values")
    # Where the key heads do not divide over the devices, each device has all of them and reads those of its queries.
    select = layout.size("act_kv_heads") != layout.size("act_heads")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        if select:
            here, group = q.shape[2], heads // kv_heads
            together = math.gcd(here, group)  # so many neighbouring query heads are sure to read the same key head
            first = jax.lax.axis_index(layout.rules["act_heads"]) * here
            read = (first + jnp.arange(0, here, together)) // group
            k, v = (jnp.take(x, read, axis=2) for x in (k, v))
        return kernel(q, k, v, segments)

    of_segments = layout.spec(("batch", None))
    in_specs = (of_q, of_kv, of_kv, of_segments)
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=of_q, check_vma=False)
    return mapped(q, k, v, segments)
