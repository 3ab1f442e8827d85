"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.core.dtypes import at_least_float32
from jaxllm.nn.parameter import parameter


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis (Zhang and Sennrich, arXiv 1910.07467, eq. 4).

    around_one: whether the parameter is the scale's distance from 1, which weight decay then draws it to.
    """

    eps: float
    around_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` → `[..., D]` in x's dtype, computed in at least float32."""
        start = nn.initializers.zeros_init() if self.around_one else nn.initializers.ones_init()
        scale = parameter(self, "scale", start, ("norm",), x.shape[-1:])
        wide = x.astype(at_least_float32(x.dtype))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(wide.dtype)
        return (normed * (1 + scale if self.around_one else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` over the last axis (Ba et al., arXiv 1607.06450, eq. 4)."""

    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` → `[..., D]` in x's dtype, computed in at least float32."""
        scale = parameter(self, "scale", nn.initializers.ones_init(), ("norm",), x.shape[-1:])
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        y *= scale.astype(wide.dtype)
        if self.use_bias:
            y += parameter(self, "bias", nn.initializers.zeros_init(), ("norm",), x.shape[-1:]).astype(wide.dtype)
        return y.astype(x.dtype)
