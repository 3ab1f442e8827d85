"""Held-out loss and perplexity, weighted by tokens."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.tree import Params
from jaxllm.models.lm import LM


class HeldOut(NamedTuple):
    """loss: mean cross entropy over `tokens` trained targets, in nats. perplexity: exp(loss)."""

    loss: float
    perplexity: float
    tokens: int


class Perplexity:
    """Evaluates `lm`, compiling once for each batch shape."""

    def __init__(self, lm: LM) -> None:
        def sums(params: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return lm.losses(params, batch).cross_entropy, jnp.sum(batch["loss_mask"])

        self._sums = jax.jit(sums)

    def __call__(self, params: Params, batches: Iterable[Mapping[str, jax.Array]]) -> HeldOut:
        """The held-out loss of `params` over all `batches` of arrays `[B, T]`, placed on the model's devices."""
        total, tokens = 0.0, 0
        for batch in batches:
            nll, count = self._sums(params, batch)
            total += float(nll)
            tokens += int(count)
        loss = total / tokens
        return HeldOut(loss, math.exp(min(loss, 700.0)), tokens)
