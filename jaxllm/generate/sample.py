"""Choosing the next token from its logits, by the steps of transformers' logits processors and in their order:
repetition penalty, temperature, top-k, top-p, min-p."""

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
    al., arXiv 1904.09751), counted after temperature and top_k. min_p: only tokens at least min_p times as likely as
    the most likely can (Nguyen et al., arXiv 2407.01082). repetition_penalty: what the positive logits of the tokens
    that the text has already, prompt included, are divided by, and the negative ones multiplied (Keskar et al.,
    arXiv 1909.05858); at temperature 0 too.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be at least 0 (0 = the most likely token), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be above 0 (1 = none), got {self.repetition_penalty}")
        narrowing = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        given = " and ".join(f"{name} {value}" for name, value in narrowing.items() if value is not None)
        if self.temperature == 0 and given:
            raise UserError(
                f"{given}: this narrows what is sampled from, and temperature 0 takes the most likely token; set "
                "temperature above 0, or leave it out"
            )


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """One token id for each row of `logits` `[B, V]`, by the row's own key of `keys` `[B]`: int32 `[B]`.

    seen: `[B, V]` bool, the tokens that the row has already; needed with a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, narrowed(logits, sampling)).astype(jnp.int32)


def penalised(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """`logits` `[B, V]`, lower where `seen` `[B, V]`: divided by `penalty` if positive, multiplied if negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def narrowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits `[B, V]` that a token is drawn from at a temperature above 0; −inf where it cannot be drawn."""
    # Below 0, so that no temperature can make them overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = jnp.where(_outside_nucleus(logits, sampling.top_p), -jnp.inf, logits)
    if sampling.min_p:
        # The most likely token's logit is 0.
        logits = jnp.where(logits < math.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _outside_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """True for the tokens that are not needed to reach the probability `top_p`."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token stays if those before it do not reach top_p yet; the first always stays.
    beyond = jnp.cumsum(probabilities, axis=-1) - probabilities >= top_p
    beyond = beyond.at[:, 0].set(False)
    return jnp.put_along_axis(jnp.zeros_like(beyond), order, beyond, axis=-1, inplace=False)
