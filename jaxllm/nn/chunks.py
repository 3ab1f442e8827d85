"""Sequences in chunks of their length, of which each has a part of every device that the length is split over."""

import jax
import jax.numpy as jnp

from jaxllm.core.mesh import Layout

# What a chunk makes takes at most this much of a device; smaller chunks cost speed, larger ones the memory that
# the chunks are there to save.
CHUNK_BYTES = 256 * 2**20


def chunks_of(length: int, bytes_of_all: float, layout: Layout) -> int:
    """The smallest number of equal chunks of `length` tokens, of which each makes no more than CHUNK_BYTES."""
    most = length // layout.size("act_length")
    return next((n for n in range(1, most) if most % n == 0 and bytes_of_all / n <= CHUNK_BYTES), most)


def in_chunks(x: jax.Array, chunks: int, layout: Layout) -> jax.Array:
    """`[B, T, …]` as `[chunks, B, T / chunks, …]`."""
    batch, length, *rest = x.shape
    parts = x.reshape(batch, layout.size("act_length"), chunks, -1, *rest)
    return jnp.moveaxis(parts, 2, 0).reshape(chunks, batch, length // chunks, *rest)


def joined(chunks: jax.Array, layout: Layout) -> jax.Array:
    """The inverse of `in_chunks`."""
    count, batch, part, *rest = chunks.shape
    parts = chunks.reshape(count, batch, layout.size("act_length"), -1, *rest)
    return jnp.moveaxis(parts, 0, 2).reshape(batch, count * part, *rest)
