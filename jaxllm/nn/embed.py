"""Token embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.mesh import Layout
from jaxllm.nn.parameter import parameter
from jaxllm.nn.prompt import virtual_tokens


class Embed(nn.Module):
    """A table `[vocab, D]` of token embeddings.

    Of an adapter it applies the leaves that it finds, and makes none: `prompt` `[n, D]`, embeddings of n virtual tokens
    that stand in front of every row; with `prompt_encoder` besides, they are what that makes of them.
    """

    vocab_size: int
    features: int
    dtype: DTypeLike
    stddev: float

    @nn.compact
    def __call__(self, tokens: jax.Array, layout: Layout, begins: bool = True) -> jax.Array:
        """`[B, T]` → `[B, T, D]` in the compute dtype; `[B, n + T, D]` where virtual tokens stand in front, unless the
        rows began in another pass."""
        normal = nn.initializers.normal(self.stddev)
        table = parameter(self, "table", normal, ("vocab", "vocab_embed"), (self.vocab_size, self.features))
        x = jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)
        if begins and self.has_variable("params", "prompt"):
            has_encoder = self.has_variable("params", "prompt_encoder")
            encoder = self.get_variable("params", "prompt_encoder") if has_encoder else None
            prompt = virtual_tokens(self.get_variable("params", "prompt"), encoder).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
        return layout.constrain(x, "batch", "act_length", "act_embed")
