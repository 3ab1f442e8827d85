"""Token embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.mesh import Layout
from jaxllm.nn.parameter import parameter


class Embed(nn.Module):
    """A table `[vocab, D]` of token embeddings."""

    vocab_size: int
    features: int
    dtype: DTypeLike
    stddev: float

    @nn.compact
    def __call__(self, tokens: jax.Array, layout: Layout) -> jax.Array:
        """`[B, T]` → `[B, T, D]` in the compute dtype."""
        normal = nn.initializers.normal(self.stddev)
        table = parameter(self, "table", normal, ("vocab", "vocab_embed"), (self.vocab_size, self.features))
        x = jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)
        return layout.constrain(x, "batch", "act_length", "act_embed")
