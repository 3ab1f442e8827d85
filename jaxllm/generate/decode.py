"""Autoregressive decoding with a key-value cache of fixed size."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.generate.sample import Sampling, draw
from jaxllm.models.base import LM
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import CachePosition


class Decoder:
    """Completes prompts with `lm`, compiling once for each shape: prompts, longest prompt, tokens to add."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._advance = jax.jit(partial(_advance, lm), static_argnames="sampling", donate_argnames="cache")

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> list[list[int]]:
        """The new token ids of each prompt, without the stop token that ended it.

        Prompts of different lengths decode together; the most likely tokens of each are those that it has alone. A
        prompt ends at the first of `stop_ids`, or after `max_new_tokens`.
        """
        completions: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for tokens in self.stream(params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed):
            for row in sorted(running):
                if tokens[row] in stop_ids:
                    running.remove(row)
                else:
                    completions[row].append(int(tokens[row]))
            if not running:
                break
        return completions

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yields the next token of every prompt, int32 `[prompts]`, `max_new_tokens` times."""
        if any(not prompt for prompt in prompts):
            raise UserError("a prompt has no token; give it some text, or use a tokenizer that begins texts with one")
        longest = max(len(prompt) for prompt in prompts)
        slots = longest + max_new_tokens
        tokens = np.zeros((len(prompts), longest), np.int32)
        # Prompts end together: padding stands on the left, in a segment of its own that no token looks at.
        segments = np.ones((len(prompts), slots), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
            segments[row, : longest - len(prompt)] = 0
        padding = jnp.asarray([[longest - len(prompt)] for prompt in prompts], jnp.int32)

        cache, key = self._lm.new_cache(len(prompts), slots), jax.random.key(seed)
        new, offset = jnp.asarray(tokens), 0
        for step in range(max_new_tokens):
            token, cache = self._advance(
                params,
                new,
                cache,
                jnp.int32(offset),
                segments,
                padding,
                jax.random.fold_in(key, step),
                sampling=sampling or Sampling(),
            )
            yield np.asarray(token)
            offset += new.shape[1]
            new = token[:, None]


def _advance(
    lm: LM,
    params: Params,
    tokens: jax.Array,
    cache: LayerCache,
    offset: jax.Array,
    segments: jax.Array,
    padding: jax.Array,
    key: jax.Array,
    *,
    sampling: Sampling,
) -> tuple[jax.Array, LayerCache]:
    """The token after `tokens` `[B, T]`, which stand in the cache from slot `offset` on."""
    positions = jnp.maximum(offset + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] - padding, 0)
    ctx = lm.context(positions, cache=CachePosition(offset, segments))
    x, written = lm.hidden(params, tokens, ctx, cache=cache)
    assert written is not None
    return draw(lm.head(params, x[:, -1:])[:, 0], key, sampling), written
