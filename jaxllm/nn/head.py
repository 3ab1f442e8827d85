"""From what the last layer gives to the logits of the next token."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.nn.embed import TOKEN_IDS, TOKEN_ROWS
from jaxllm.nn.linear import ADAPTER, project, with_low_rank
from jaxllm.nn.parameter import parameter


class Head(nn.Module):
    """An output matrix `[in, vocab]`, or the table of the embedding where they are `tied`.

    It applies the leaves `lora_…` of an adapter as `Linear` does, without dropout.

    scale: what logits are multiplied by. soft_cap: c, after which they are c · tanh(logits / c).
    """

    vocab_size: int
    stddev: float
    tied: bool = False
    scale: float = 1.0
    soft_cap: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, embed: Mapping[str, jax.Array]) -> jax.Array:
        """`[..., in]` → `[..., vocab]` in at least float32. embed: the leaves of the embedding, read where tied."""
        z = tied_logits(x, embed) if self.tied else self._own_logits(x)
        if self.scale != 1:
            z *= self.scale
        return z if self.soft_cap is None else self.soft_cap * jnp.tanh(z / self.soft_cap)

    def _own_logits(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.vocab_size)
        normal = nn.initializers.normal(self.stddev)
        kernel = parameter(self, "kernel", normal, ("vocab_embed", "vocab"), shape)
        adapter = {name: self.get_variable("params", name) for name in ADAPTER if self.has_variable("params", name)}
        z = project(x, kernel)
        return with_low_rank(z, x, kernel, adapter, project) if "lora_a" in adapter else z


def tied_logits(x: jax.Array, embed: Mapping[str, jax.Array]) -> jax.Array:
    """`[..., D]` → `[..., vocab]` in at least float32: the logits of a head that is the table of the embedding `embed`,
    with the leaves of its adapter."""
    z = project(x, embed["table"].T)
    if "lora_a" in embed:
        z += project(project(x, embed["lora_b"].T).astype(x.dtype), embed["lora_a"].T) * embed["lora_scale"]
    if TOKEN_ROWS in embed:
        z = z.at[..., embed[TOKEN_IDS]].set(project(x, embed[TOKEN_ROWS].T))
    return z
