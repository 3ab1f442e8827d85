"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.core.dtypes import at_least_float32
from jaxllm.nn.parameter import parameter


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` → `[..., D]` in x's dtype, computed in at least float32."""
        scale = parameter(self, "scale", nn.initializers.ones_init(), ("norm",), x.shape[-1:])
        wide = x.astype(at_least_float32(x.dtype))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(wide.dtype)).astype(x.dtype)
