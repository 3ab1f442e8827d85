"""Choosing the next token from its logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    temperature: logits are divided by it; 0 takes the most likely token. top_k: only the k most likely tokens can
    be drawn. top_p: only the smallest set of most likely tokens whose probability reaches top_p can (Holtzman et
    al., arXiv 1904.09751), counted after temperature and top_k.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be at least 0 (0 = the most likely token), got {self.temperature}")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise UserError(
                f"top_k {self.top_k} and top_p {self.top_p} choose what is sampled from, and temperature 0 takes the "
                "most likely token; set temperature above 0, or leave them out"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id for each row of `logits` `[B, V]`: int32 `[B]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, narrowed(logits, sampling), axis=-1).astype(jnp.int32)


def narrowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits `[B, V]` that a token is drawn from at a temperature above 0; −inf where it cannot be drawn."""
    # Below 0, so that no temperature can make them overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = jnp.where(_outside_nucleus(logits, sampling.top_p), -jnp.inf, logits)
    return logits


def _outside_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """True for the tokens that are not needed to reach the probability `top_p`."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token stays if those before it do not reach top_p yet; the first always stays.
    beyond = jnp.cumsum(probabilities, axis=-1) - probabilities >= top_p
    beyond = beyond.at[:, 0].set(False)
    return jnp.put_along_axis(jnp.zeros_like(beyond), order, beyond, axis=-1, inplace=False)
