"""Causal attention between the tokens of one document, tile by tile, as GPU kernels in Pallas (Triton).

FlashAttention-2 (Dao, arXiv 2307.08691): scores are made a tile at a time in the chip's fast memory and never
stored; the forward pass keeps the log-sum-exp of each row, from which the backward pass makes them again. Beyond
the paper: key and value heads are read by all query heads of their group and never repeated, and tiles between
documents that do not meet, or that a window leaves out, are not visited. No sum depends on the order in which
programs run, so that a run's bits repeat.

Pallas ships such a kernel (`jax.experimental.pallas.ops.gpu.attention`); it wants as many key heads as query heads
and a length of whole tiles, and visits every earlier tile.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec

# Sequences are padded to a multiple of it; every tile's side divides it.
TILE = 128
# Scores are kept in base 2, whose exponential is one instruction.
LOG2E = math.log2(math.e)
# Below every score, and finite: the difference of two is a number.
MASKED = -1e30
PADDING = jnp.iinfo(jnp.int32).max


class Tiles(NamedTuple):
    """A kernel's tile of queries × keys, and how Triton runs a program: warps, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles_of(head_dim: int) -> tuple[Tiles, Tiles, Tiles]:
    """The tiles of the forward kernel, of that of dq, and of that of dk and dv, for a power of two `head_dim`.

    Compiled for H100, none spills a register, whatever the spec; for A100, those of heads of 64 do, and those of 128
    with a window, a soft cap and sinks together. Each fits into the 99 KiB of fast memory that the smallest cards since
    Ampere give a program.
    """
    if head_dim <= 64:
        return Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)
    if head_dim <= 128:
        return Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)
    return Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    spec: AttentionSpec = PLAIN,
    first: jax.Array | int = 0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The attention of `spec` over the earlier keys of each query's segment: `[B, T, H, d]`, as `q`.

    q: `[B, T, H, d]`; k, v: `[B, S, K, d]`; query head h reads key head h // (H / K). segments: `[B, S]` int32, None
    = one a row. Any numbering is right; tiles are left out where a row's segments ascend, 0 (padding) at the end.
    first: the key at which the first query stands, from 0 to S − T; it may be traced.
    The spec has no slopes, and no keys in front. Scores, softmax and all sums are in float32. interpret: run the
    kernels in plain JAX, for tests.
    """
    (batch, length, _, width), keys = q.shape, k.shape[1]
    if segments is None:
        segments = jnp.ones((batch, keys), jnp.int32)
    # Only equality matters to the result, and padding that is numbered last keeps tiles apart.
    segments = jnp.where(segments == 0, PADDING, segments)
    of_queries = jax.lax.dynamic_slice_in_dim(segments, first, length, axis=1)
    # No earlier token sees what is added at the end of the row; zeros added to the width add nothing to a product.
    columns = pl.next_power_of_2(max(width, 16)) - width
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, columns))) for x in (q, k, v))
    of_queries, segments = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE)), constant_values=PADDING) for x in (of_queries, segments)
    )
    # No key is farther away than the row is long; the sum of two places stays an int32.
    window = None if spec.window is None else jnp.reshape(jnp.minimum(spec.window, keys), 1).astype(jnp.int32)
    places = Places(jnp.reshape(first, 1).astype(jnp.int32), of_queries, segments, window)
    sinks = None if spec.sinks is None else spec.sinks.astype(jnp.float32)
    scores = Scores(1 / math.sqrt(width) if spec.scale is None else spec.scale, spec.soft_cap)
    y: Any = _attention(q, k, v, places, sinks, scores, interpret)
    return y[:, :length, :, :width]


class Places(NamedTuple):
    """Where tokens stand. first: `[1]` int32, the key of the first query. queries, keys: `[B, T]` and `[B, S]` int32,
    the segments. window: `[1]` int32, how many keys a query sees at most, its own one of them; None = all."""

    first: jax.Array
    queries: jax.Array
    keys: jax.Array
    window: jax.Array | None = None


class Scores(NamedTuple):
    """How a score follows from a product: times `scale`, then under the soft cap."""

    scale: float
    soft_cap: float | None = None

    def of(self, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The scores, in base 2, and the derivative of the soft cap; None without one."""
        if self.soft_cap is None:
            return products * (self.scale * LOG2E), None
        bent = jnp.tanh(products * (self.scale / self.soft_cap))
        return bent * (self.soft_cap * LOG2E), 1 - bent * bent


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    sinks: jax.Array | None,
    scores: Scores,
    interpret: bool,
) -> jax.Array:
    return _forward(q, k, v, places, sinks, scores, interpret)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    sinks: jax.Array | None,
    scores: Scores,
    interpret: bool,
) -> tuple[jax.Array, tuple[Any, ...]]:
    (batch, length, heads, width), keys = q.shape, k.shape[1]
    tiles, _, _ = tiles_of(width)
    first, _ = meeting(places, tiles)
    head, whole, row = _specs(tiles.queries, keys, width, heads // k.shape[2])
    of_sink = None if sinks is None else pl.BlockSpec((1,), lambda i, b, h: (h,))
    y, lse = pl.pallas_call(
        partial(_forward_kernel, scores_of=scores.of, tiles=tiles),
        grid=(length // tiles.queries, batch, heads),
        in_specs=[head, whole, whole, _places_of(places), _row_of(first.shape[1]), of_sink],
        out_specs=[head, row],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, places, first, sinks)
    # With both of them saved, the backward pass need not run this kernel again.
    y, lse = (checkpoint_name(x, "attn_context") for x in (y, lse))
    return y, (q, k, v, places, sinks, y, lse)


def _backward(scores: Scores, interpret: bool, saved: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    q, k, v, places, sinks, y, lse = saved
    batch, length, heads, width = q.shape
    _, keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    delta = jnp.einsum("bthd,bthd->bht", y.astype(jnp.float32), dy.astype(jnp.float32))
    _, for_dq, for_dkv = tiles_of(width)

    first, _ = meeting(places, for_dq)
    head, whole, row = _specs(for_dq.queries, keys, width, group)
    dq = pl.pallas_call(
        partial(_dq_kernel, scores=scores, tiles=for_dq),
        grid=(length // for_dq.queries, batch, heads),
        in_specs=[head, whole, whole, _places_of(places), _row_of(first.shape[1]), head, row, row],
        out_specs=head,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=for_dq.warps, num_stages=for_dq.stages),
        interpret=interpret,
        name="attention_dq",
    )(q, k, v, places, first, dy, lse, delta)

    _, last = meeting(places, for_dkv)
    tile = pl.BlockSpec((None, for_dkv.keys, None, width), lambda j, b, h: (b, j, h, 0))
    of_group = pl.BlockSpec((None, length, group, width), lambda j, b, h: (b, 0, h, 0))
    rows_of_group = pl.BlockSpec((None, group, length), lambda j, b, h: (b, h, 0))
    dk, dv = pl.pallas_call(
        partial(_dkv_kernel, scores=scores, tiles=for_dkv, group=group),
        grid=(keys // for_dkv.keys, batch, kv_heads),
        in_specs=[
            *(of_group, tile, tile, _places_of(places), _row_of(last.shape[1])),
            *(of_group, rows_of_group, rows_of_group),
        ],
        out_specs=[tile, tile],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=triton.CompilerParams(num_warps=for_dkv.warps, num_stages=for_dkv.stages),
        interpret=interpret,
        name="attention_dkv",
    )(q, k, v, places, last, dy, lse, delta)
    if sinks is None:
        return dq, dk, dv, None, None
    # The score of a sink has a weight and no value.
    weights = jnp.exp2(sinks[:, None] * LOG2E - lse)
    return dq, dk, dv, None, -jnp.sum(weights * delta, axis=(0, 2))


_attention.defvjp(_forward, _backward)


def _specs(queries: int, keys: int, width: int, group: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """For program (i, b, h): query tile i of head h, all keys of the head that h reads, tile i of scalars."""
    return (
        pl.BlockSpec((None, queries, None, width), lambda i, b, h: (b, i, h, 0)),
        pl.BlockSpec((None, keys, None, width), lambda i, b, h: (b, 0, h // group, 0)),
        pl.BlockSpec((None, None, queries), lambda i, b, h: (b, h, i)),
    )


def _row_of(size: int) -> pl.BlockSpec:
    """Sequence b of an array `[B, size]`."""
    return pl.BlockSpec((None, size), lambda i, b, h: (b, 0))


def _places_of(places: Places) -> Any:
    """`Places` of sequence b."""
    scalar = pl.BlockSpec((1,), lambda i, b, h: (0,))
    of_window = None if places.window is None else scalar
    specs: Any = Places  # the same fields, of block specs in place of arrays
    return specs(scalar, _row_of(places.queries.shape[1]), _row_of(places.keys.shape[1]), of_window)


def meeting(places: Places, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """The first tile of keys that each tile of queries must visit, and the last tile of queries that each tile of
    keys must: `[B, T / tile]` and `[B, S / tile]` int32; where there is none, a first that is past the end, or past
    the last that causal order leaves, and a last that is before the first.

    Two tiles meet if the ranges of their segment numbers do, which every two tokens of one segment see to, and if the
    window of the first query reaches the last key.
    """

    def ranges(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        numbers = segments.reshape(segments.shape[0], -1, size)
        return numbers.min(-1), numbers.max(-1)

    (q_low, q_high), (k_low, k_high) = ranges(places.queries, tiles.queries), ranges(places.keys, tiles.keys)
    meet = (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])
    queries, keys = meet.shape[1:]
    first = jnp.where(meet.any(2), jnp.argmax(meet, axis=2), keys)
    last = jnp.where(meet.any(1), queries - 1 - jnp.argmax(meet[:, ::-1], axis=1), -1)
    if places.window is not None:
        earliest = places.first + jnp.arange(queries) * tiles.queries - places.window + 1
        first = jnp.maximum(first, earliest // tiles.keys)
        latest = jnp.arange(1, keys + 1) * tiles.keys - 1 + places.window - 1 - places.first
        last = jnp.minimum(last, latest // tiles.queries)
    return first.astype(jnp.int32), last.astype(jnp.int32)


def past_last(number: Any, start: Any, tiles: Tiles) -> Any:
    """The tile of keys behind the last that causal order lets the tile `number` of queries see. start: the key of the
    first query of all."""
    return pl.cdiv(start + (number + 1) * tiles.queries, tiles.keys)


def _tile(number: Any, size: int, first: Any = 0) -> tuple[Any, jax.Array]:
    """The slice of the tile `number` of `size` tokens, and where these stand if the first of all does at `first`."""
    return pl.ds(number * size, size), first + number * size + jnp.arange(size, dtype=jnp.int32)


def _window_of(places: Places) -> jax.Array | None:
    return None if places.window is None else places.window[0]


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    places: Places,
    first_ref: Any,
    sink_ref: Any,
    y_ref: Any,
    lse_ref: Any,
    *,
    scores_of: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]],
    tiles: Tiles,
) -> None:
    """One tile of queries of one head: over the tiles of keys, the maximum m, the sum of the weights and y run."""
    i = pl.program_id(0)
    start, window = places.first[0], _window_of(places)
    here, at = _tile(i, tiles.queries, start)
    q, q_segments = q_ref[...], places.queries[here]

    def visit(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y, m, total = carry
        there, key_at = _tile(j, tiles.keys)
        sees = (at[:, None] >= key_at[None, :]) & (q_segments[:, None] == places.keys[there][None, :])
        if window is not None:
            sees &= at[:, None] - key_at[None, :] < window
        scores = jnp.where(sees, scores_of(triton.dot(q, k_ref[there, :], trans_b=True))[0], MASKED)
        new_m = jnp.maximum(m, jnp.max(scores, axis=1))
        # A row that has seen no key yet has m = MASKED, from which a masked score is no different.
        p = jnp.where(sees, jnp.exp2(scores - new_m[:, None]), 0.0)
        shrink = jnp.exp2(m - new_m)
        v = v_ref[there, :]
        y = y * shrink[:, None] + triton.dot(p.astype(v.dtype), v)
        return y, new_m, total * shrink + jnp.sum(p, axis=1)

    # A sink has been seen before any key: its weight is 1, and its value 0.
    nothing = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(tiles.queries, MASKED if sink_ref is None else sink_ref[0] * LOG2E, jnp.float32),
        jnp.full(tiles.queries, 0.0 if sink_ref is None else 1.0, jnp.float32),
    )
    past = jnp.minimum(past_last(i, start, tiles), k_ref.shape[0] // tiles.keys)
    y, m, total = jax.lax.fori_loop(first_ref[i], past, visit, nothing)
    # The largest weight is 1. A query of padding may have seen no key at all.
    total = jnp.maximum(total, 1.0)
    y_ref[...] = (y / total[:, None]).astype(y_ref.dtype)
    lse_ref[...] = m + jnp.log2(total)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    places: Places,
    first_ref: Any,
    dy_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    *,
    scores: Scores,
    tiles: Tiles,
) -> None:
    """One tile of queries of one head: with p the weights, `dq = Σ p ∘ (dy vᵀ − Σ y dy) k · scale` over the keys."""
    i = pl.program_id(0)
    start, window = places.first[0], _window_of(places)
    here, at = _tile(i, tiles.queries, start)
    q, dy, q_segments = q_ref[...], dy_ref[...], places.queries[here]
    lse, delta = lse_ref[...], delta_ref[...]

    def visit(j: Any, dq: jax.Array) -> jax.Array:
        there, key_at = _tile(j, tiles.keys)
        k = k_ref[there, :]
        sees = (at[:, None] >= key_at[None, :]) & (q_segments[:, None] == places.keys[there][None, :])
        if window is not None:
            sees &= at[:, None] - key_at[None, :] < window
        score, slope = scores.of(triton.dot(q, k, trans_b=True))
        p = jnp.where(sees, jnp.exp2(score - lse[:, None]), 0.0)
        ds = p * (triton.dot(dy, v_ref[there, :], trans_b=True) - delta[:, None])
        if slope is not None:
            ds *= slope
        return dq + triton.dot(ds.astype(k.dtype), k)

    past = jnp.minimum(past_last(i, start, tiles), k_ref.shape[0] // tiles.keys)
    dq = jax.lax.fori_loop(first_ref[i], past, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scores.scale).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    places: Places,
    last_ref: Any,
    dy_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    scores: Scores,
    tiles: Tiles,
    group: int,
) -> None:
    """One tile of keys of one key head: `dv = Σ pᵀ dy`, `dk = Σ (p ∘ (dy vᵀ − Σ y dy))ᵀ q · scale` over the queries
    of every head of its group. Products are made transposed, `[keys, queries]`, as they are used."""
    j, start, window = pl.program_id(0), places.first[0], _window_of(places)
    here, at = _tile(j, tiles.keys)
    k, v, k_segments = k_ref[...], v_ref[...], places.keys[here]

    def visit(head: Any, i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        there, query_at = _tile(i, tiles.queries, start)
        q, dy = q_ref[there, head, :], dy_ref[there, head, :]
        sees = (at[:, None] <= query_at[None, :]) & (k_segments[:, None] == places.queries[there][None, :])
        if window is not None:
            sees &= query_at[None, :] - at[:, None] < window
        score, slope = scores.of(triton.dot(k, q, trans_b=True))
        p = jnp.where(sees, jnp.exp2(score - lse_ref[head, there][None, :]), 0.0)
        dv = dv + triton.dot(p.astype(dy.dtype), dy)
        ds = p * (triton.dot(v, dy, trans_b=True) - delta_ref[head, there][None, :])
        if slope is not None:
            ds *= slope
        return dk + triton.dot(ds.astype(q.dtype), q), dv

    def of_head(head: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(earliest, last_ref[j] + 1, partial(visit, head), carry)

    earliest = jnp.maximum(j * tiles.keys - start, 0) // tiles.queries
    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    dk_ref[...] = (dk * scores.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
