"""Token embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.mesh import Layout


class Embed(nn.Module):
    """A table `[vocab, D]` of token embeddings."""

    vocab_size: int
    features: int
    dtype: DTypeLike
    stddev: float

    @nn.compact
    def __call__(self, tokens: jax.Array, layout: Layout) -> jax.Array:
        """`[B, T]` → `[B, T, D]` in the compute dtype."""
        normal = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), ("vocab", "vocab_embed"))
        table = self.param("table", normal, (self.vocab_size, self.features))
        x = jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)
        return layout.constrain(x, "batch", "act_length", "act_embed")
