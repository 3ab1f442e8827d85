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
from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec
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
    spec: AttentionSpec = PLAIN,
) -> jax.Array:
    """The attention of `spec` over the earlier keys of each query's segment: `[B, T, H, d]`, as `q`.

    q: `[B, T, H, d]`; k, v: `[B, S, K, d]`, the last T of them where the queries are; query head h reads key head
    h // (H / K). segments: `[B, S]` int32, None = one a row. All are laid out by `layout`, the width of a head whole.
    "xla": plain JAX, on any device, in any precision. "cudnn": NVIDIA's kernel, which cannot tell segments apart: it
    wants None. "flash": a kernel of our own that can (interpreted on a CPU, for tests). These two have as many keys as
    queries, and flash none that are shared. `lacks` says which numbers of a spec they do not have.

    Raises ValueError where the form cannot compute this.

    Where the layout splits the length, S is T and none are shared. "xla" then has each device compute its queries'
    scores of all keys, the masked ones too. "flash" leaves those out, and evens out what remains: the queries of an
    early part of the sequence see few keys, so half of them are computed by a device of a late part, and the other way
    round. "cudnn" cannot: its queries begin at the first key.
    """
    apart = layout.size("act_inner_length") > 1
    if (apart or form != "xla") and (spec.prefix or (spec.shared and form != "cudnn")):
        splits = f"the mesh {layout}, which splits the length," if apart else f"the attention {form!r}"
        raise ValueError(f"{splits} cannot have keys of virtual tokens in front")
    if lack := lacks(form, spec):
        raise ValueError(f"the attention {form!r} {lack}; choose another form")
    if form == "xla":
        if not apart:
            return plain_attention(q, k, v, segments, spec)
        return _on_each_device(attention_from, q, k, v, segments, layout, spec)
    if form == "flash":
        kernel = partial(flash_attention, interpret=layout.platform == "cpu")
        kernel = partial(_evened, kernel, layout=layout) if apart else kernel
        return _on_each_device(kernel, q, k, v, segments, layout, spec)
    if segments is not None:
        raise ValueError("cuDNN's attention does not keep documents apart; pass segments=None or choose another form")
    if apart:
        raise ValueError("cuDNN's attention has no queries that begin behind the first key; choose another form")
    return _on_each_device(lambda q, k, v, _, spec: cudnn_attention(q, k, v, spec), q, k, v, None, layout, spec)


def lacks(form: AttentionForm, spec: AttentionSpec) -> str | None:
    """What of `spec` the form does not have, as "has no …"; None if it has all."""
    if form != "xla" and spec.slopes is not None:
        return "has no slopes by distance (ALiBi)"
    if form != "cudnn":
        return None
    if spec.soft_cap is not None:
        return "has no soft cap of scores"
    if spec.sinks is not None:
        return "has no sinks in the softmax"
    if not (spec.window is None or isinstance(spec.window, int)):
        return "has no window that differs between layers"
    return None


def plain_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None, spec: AttentionSpec = PLAIN
) -> jax.Array:
    """The plain form of `causal_attention`."""
    length = q.shape[1]
    front = spec.prefix
    at_once = max(QUERIES_AT_ONCE, -(-length // MOST_PARTS))

    def part(start: int) -> jax.Array:
        stop = min(start + at_once, length)
        first, last = front + start, front + stop
        mask = causal_mask(segments, first, last, spec.in_front)
        earlier = None if segments is None else segments[:, :last]
        distances = spec.distances(jnp.arange(first, last), earlier, last)
        return attend(q[:, start:stop], k[:, :last], v[:, :last], mask, spec, distances)

    return jnp.concatenate([part(start) for start in range(0, length, at_once)], axis=1)


def attention_from(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec, first: jax.Array
) -> jax.Array:
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
        return attend(q, k, v, mask, spec, spec.distances(places, segments, k.shape[1]))

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


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    spec: AttentionSpec = PLAIN,
    distances: jax.Array | None = None,
) -> jax.Array:
    """The attention of `spec` for q `[B, T, H, d]` and k, v `[B, S, K, d]`, softmax in at least float32.

    mask: `[B or 1, T, S]` bool, True where a query may look, before the window is applied; each query must see some
    key. A masked key gets a weight of exactly 0. distances: the result of `spec.distances`. Query head h reads key head
    h // (H / K).
    """
    batch, length, heads, width = q.shape
    kv_heads, wide = k.shape[2], at_least_float32(q.dtype)
    by_group = (batch, kv_heads, heads // kv_heads, length)
    # All queries that read a key head are the rows of one matrix.
    rows = q.reshape(batch, length, *by_group[1:3], width).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
    scores = jnp.einsum("bkrd,bskd->bkrs", rows, k, preferred_element_type=wide).reshape(*by_group, -1)
    scores = spec.capped(scores / math.sqrt(width) if spec.scale is None else scores * spec.scale)
    if spec.slopes is not None:
        assert distances is not None
        scores -= spec.slopes.astype(wide).reshape(*by_group[1:3], 1, 1) * distances[:, None, None]
    if spec.window is not None:
        assert distances is not None
        mask &= distances < spec.window
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    sinks = None if spec.sinks is None else spec.sinks.astype(wide).reshape(*by_group[1:3], 1, 1)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    largest = jax.lax.stop_gradient(largest)
    # The sum of the weights divides their product with v, which is smaller than they are.
    weights = jnp.exp(scores - largest)
    y = jnp.einsum(
        "bkrs,bskd->bkrd",
        weights.astype(v.dtype).reshape(*rows.shape[:3], -1),
        v,
        preferred_element_type=wide,
    ).reshape(*by_group, width)
    total = jnp.sum(weights, axis=-1)[..., None]
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    y = (y / total).astype(v.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec = PLAIN) -> jax.Array:
    """cuDNN's form of `causal_attention`, for one segment a row."""
    window = None if spec.window is None else (int(spec.window) - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=spec.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def _on_each_device(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    layout: Layout,
    spec: AttentionSpec,
) -> jax.Array:
    """`kernel(q, k, v, segments, spec)`, run by each device on its own sequences and heads: the compiler cannot split
    it.

    Where the layout splits the length it is `kernel(q, k, v, segments, spec, first)`, with all keys of a sequence, and
    the queries that begin at its place `first`.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    of_q = layout.spec(("batch", "act_inner_length", "act_heads", None), q.shape, "queries")
    of_kv = layout.spec(("batch", "act_inner_length", "act_kv_heads", None), k.shape, "keys and values")
    splits = layout.rules["act_inner_length"]
    apart = layout.size("act_inner_length") > 1
    # Where the key heads do not divide over the devices, each device has all of them and reads those of its queries.
    select = layout.size("act_kv_heads") != layout.size("act_heads")

    # What is static of the spec cannot be an operand.
    arrays = {name: spec._asdict()[name] for name in ("window", "slopes", "sinks")}
    arrays = {name: a for name, a in arrays.items() if a is not None and not isinstance(a, int)}

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, arrays: dict[str, jax.Array]
    ) -> jax.Array:
        own = spec._replace(**arrays)
        if select:
            here, group = q.shape[2], heads // kv_heads
            together = math.gcd(here, group)  # so many neighbouring query heads are sure to read the same key head
            first = jax.lax.axis_index(layout.rules["act_heads"]) * here
            read = (first + jnp.arange(0, here, together)) // group
            k, v = (jnp.take(x, read, axis=2) for x in (k, v))
        if not apart:
            return kernel(q, k, v, segments, own)
        k, v, segments = jax.tree.map(lambda x: jax.lax.all_gather(x, splits, axis=1, tiled=True), (k, v, segments))
        return kernel(q, k, v, segments, own, jax.lax.axis_index(splits) * q.shape[1])

    if apart:  # what was gathered is not kept for the backward pass, nor the scores of the plain form
        local = jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names("attn_context"))
    of_segments = layout.spec(("batch", "act_inner_length"))
    of_arrays = {name: layout.spec(("act_heads",) if a.ndim else (), a.shape, name) for name, a in arrays.items()}
    in_specs = (of_q, of_kv, of_kv, of_segments, of_arrays)
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=of_q, check_vma=False)
    return mapped(q, k, v, segments, arrays)


def _evened(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    spec: AttentionSpec,
    first: jax.Array,
    *,
    layout: Layout,
) -> jax.Array:
    """`kernel(q, k, v, segments, spec, first)`, which takes as long on each of the n devices that share a sequence.

    In halves of a device's queries, device i computes its own number 2i and, of device n − 1 − i, number 2n − 1 − 2i.
    """
    splits = layout.rules["act_inner_length"]
    ways, half = layout.size("act_inner_length"), q.shape[1] // 2

    def exchanged(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, splits, [(i, ways - 1 - i) for i in range(ways)])

    of_other = (ways - 1) * q.shape[1] - first + half
    own = kernel(q[:, :half], k, v, segments, spec, first)
    other = kernel(exchanged(q[:, half:]), k, v, segments, spec, of_other)
    return jnp.concatenate([own, exchanged(other)], axis=1)
