"""The one place that multiplies by a weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.dtypes import at_least_float32
from jaxllm.nn.parameter import parameter


class Linear(nn.Module):
    """`x @ kernel + bias`, with the kernel stored as the matrix `[in, out]`.

    axes: the logical axes of the kernel; the bias has the last of them.
    """

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike
    stddev: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` → `[..., out]` in the compute dtype."""
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.normal(self.stddev), self.axes, shape)
        y = multiply(x, kernel.astype(self.dtype))
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros_init(), self.axes[1:], (self.features,))
            y += bias.astype(self.dtype)
        return y


class Head(nn.Module):
    """The output matrix `[in, vocab]` of an untied model: logits in at least float32."""

    vocab_size: int
    stddev: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` → `[..., vocab]`."""
        shape = (x.shape[-1], self.vocab_size)
        normal = nn.initializers.normal(self.stddev)
        return project(x, parameter(self, "kernel", normal, ("vocab_embed", "vocab"), shape))


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` multiplied in x's dtype and accumulated in at least float32."""
    return multiply(x, kernel.astype(x.dtype), at_least_float32(x.dtype))


def multiply(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`[..., in]` times `[in, out]`, in `dtype` where one is given."""
    # As a product of matrices: of a batch of them, XLA's CPU backend copies every operand of the backward pass into
    # another order first, which made a feed-forward layer's gradient 1.7 times as slow.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
