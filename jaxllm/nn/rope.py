"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form of Hugging Face weights."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.dtypes import at_least_float32


def rope_tables(positions: jax.Array, head_dim: int, theta: float, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, head_dim / 2]` of `position · theta^(-2i / head_dim)`, in at least float32."""
    wide = at_least_float32(dtype)
    inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angles = positions.astype(wide)[..., None] * inverse
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of `x` `[B, T, H, head_dim]`; the result has x's dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
