"""Causal self-attention of a batch, in three forms that mean the same.

Where the length is split over devices (context parallelism), each has its own queries and gathers the keys and values
of all, which with grouped queries are much less, and which any mask of packed documents works on (Llama Team, arXiv
2407.21783, section 3.3.2). What is gathered lives while one layer is computed, and is gathered again for its gradient,
which each device hands back in parts.
"""

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
    behind them, whatever its segment. All are laid out by `layout`, the width of a head whole.
    "xla": plain JAX, on any device, in any precision. "cudnn": NVIDIA's kernel, which cannot tell segments apart: it
    wants None. "flash": a kernel of our own that can (interpreted on a CPU, for tests). These two have as many keys as
    queries, and flash none that are shared.

    Where the layout splits the length, S is T and none are shared. "xla" then has each device compute its queries'
    scores of all keys, the masked ones too. "flash" leaves those out, and evens out what remains: the queries of an
    early part of the sequence see few keys, so half of them are computed by a device of a late part, and the other way
    round. "cudnn" cannot: its queries begin at the first key.
    """
    apart = layout.size("act_inner_length") > 1
    if (apart or form != "xla") and (k.shape[1] != q.shape[1] or (shared and form != "cudnn")):
        splits = f"the mesh {layout}, which splits the length," if apart else f"the attention {form!r}"
        raise ValueError(f"{splits} cannot have keys of virtual tokens in front")
    if form == "xla":
        if not apart:
            return plain_attention(q, k, v, segments, shared)
        return _on_each_device(attention_from, q, k, v, segments, layout)
    if form == "flash":
        kernel = partial(flash_attention, interpret=layout.platform == "cpu")
        return _on_each_device(partial(_evened, kernel, layout=layout) if apart else kernel, q, k, v, segments, layout)
    if segments is not None:
        raise ValueError("cuDNN's attention does not keep documents apart; pass segments=None or choose another form")
    if apart:
        raise ValueError("cuDNN's attention has no queries that begin behind the first key; choose another form")
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


def attention_from(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, first: jax.Array) -> jax.Array:
    """The plain form for the queries `[B, t, H, d]` of a part of the row that begins at `first`, a scalar int32.

    The scores of some of them exist at a time, and are computed again in the backward pass.
    """
    batch, length, heads, width = q.shape
    at_once = min(QUERIES_AT_ONCE, length)

    @jax.checkpoint
    def part(queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, first = queries
        places = first + jnp.arange(at_once)
        mask = (places[:, None] >= jnp.arange(k.shape[1])[None, :])[None]
        if segments is not None:
            mask &= jnp.take(segments, places, axis=1, mode="clip")[:, :, None] == segments[:, None, :]
        return attend(q, k, v, mask)

    q = jnp.pad(q, ((0, 0), (0, -length % at_once), (0, 0), (0, 0)))
    parts = q.reshape(batch, -1, at_once, heads, width).swapaxes(0, 1)
    y = jax.lax.map(part, (parts, first + at_once * jnp.arange(len(parts))))
    return y.swapaxes(0, 1).reshape(q.shape)[:, :length]


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
    """`kernel(q, k, v, segments)`, run by each device on its own sequences and heads: the compiler cannot split it.

    Where the layout splits the length it is `kernel(q, k, v, segments, first)`, with all keys of a sequence, and the
    queries that begin at its place `first`.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    of_q = layout.spec(("batch", "act_inner_length", "act_heads", None), q.shape, "queries")
    of_kv = layout.spec(("batch", "act_inner_length", "act_kv_heads", None), k.shape, "keys and values")
    splits = layout.rules["act_inner_length"]
    apart = layout.size("act_inner_length") > 1
    # Where the key heads do not divide over the devices, each device has all of them and reads those of its queries.
    select = layout.size("act_kv_heads") != layout.size("act_heads")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        if select:
            here, group = q.shape[2], heads // kv_heads
            together = math.gcd(here, group)  # so many neighbouring query heads are sure to read the same key head
            first = jax.lax.axis_index(layout.rules["act_heads"]) * here
            read = (first + jnp.arange(0, here, together)) // group
            k, v = (jnp.take(x, read, axis=2) for x in (k, v))
        if not apart:
            return kernel(q, k, v, segments)
        k, v, segments = jax.tree.map(lambda x: jax.lax.all_gather(x, splits, axis=1, tiled=True), (k, v, segments))
        return kernel(q, k, v, segments, jax.lax.axis_index(splits) * q.shape[1])

    if apart:  # what was gathered is not kept for the backward pass, nor the scores of the plain form
        local = jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names("attn_context"))
    of_segments = layout.spec(("batch", "act_inner_length"))
    in_specs = (of_q, of_kv, of_kv, of_segments)
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=of_q, check_vma=False)
    return mapped(q, k, v, segments)


def _evened(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    first: jax.Array,
    *,
    layout: Layout,
) -> jax.Array:
    """`kernel(q, k, v, segments, first)`, which takes as long on each of the n devices that share a sequence.

    In halves of a device's queries, device i computes its own number 2i and, of device n − 1 − i, number 2n − 1 − 2i.
    """
    splits = layout.rules["act_inner_length"]
    ways, half = layout.size("act_inner_length"), q.shape[1] // 2

    def exchanged(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, splits, [(i, ways - 1 - i) for i in range(ways)])

    of_other = (ways - 1) * q.shape[1] - first + half
    own = kernel(q[:, :half], k, v, segments, first)
    other = kernel(exchanged(q[:, half:]), k, v, segments, of_other)
    return jnp.concatenate([own, exchanged(other)], axis=1)
