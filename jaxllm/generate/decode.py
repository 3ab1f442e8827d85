"""Autoregressive decoding with a key-value cache of fixed size."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.generate.sample import Sampling, draw
from jaxllm.models.lm import LM
from jaxllm.nn.attention import VIRTUAL
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import CachePosition


class Rows(NamedTuple):
    """What does not change while prompts are decoded together.

    segments: `[B, S]` int32, 0 in the slots of the padding in front of a prompt, VIRTUAL in those of an adapter's
    virtual tokens, in front of all. padding: `[B, 1]` int32, how many
    those are. keys: `[B]`, of each row's draws.
    """

    segments: jax.Array
    padding: jax.Array
    keys: jax.Array


class Progress(NamedTuple):
    """What every step of decoding changes.

    offset: scalar int32, the cache slots that are filled. drawn: scalar int32, the new tokens of a row. seen:
    `[B, V]` bool, the tokens that each row has; None without a repetition penalty.
    """

    cache: LayerCache
    offset: jax.Array
    drawn: jax.Array
    seen: jax.Array | None


class Decoder:
    """Completes prompts with `lm`.

    Programs are compiled for the number of prompts and for the bucket of lengths (`bucket`) that the longest prompt
    and the cache fall into, one for the prompts and one for all further tokens.
    """

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        static = ("sampling", "begins")
        self.advance = jax.jit(partial(_advance, lm), static_argnames=static, donate_argnames="progress")

    def room(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """How many of `max_new_tokens` fit behind `prompt` into the model's positions.

        Raises UserError if the prompt is empty, or so long that none does.
        """
        if not prompt:
            raise UserError("a prompt has no token; give it some text, or use a tokenizer that begins texts with one")
        left = self._lm.config.longest - self._lm.prompt_tokens - self._lm.prefix_tokens - len(prompt)
        if left < 1:
            raise UserError(
                f"a prompt has {len(prompt):,} tokens, and the model's {self._lm.config.longest:,} positions leave no "
                "room for a new one; shorten it"
            )
        return min(left, max_new_tokens)

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

        Prompts of different lengths decode together; each gets the tokens that it gets alone. A prompt ends at the
        first of `stop_ids`, after `max_new_tokens`, or at the last of the model's positions.
        """
        completions: list[list[int]] = [[] for _ in prompts]
        rooms = [self.room(prompt, max_new_tokens) for prompt in prompts]
        running = set(range(len(prompts)))
        for tokens in self.stream(params, prompts, max_new_tokens=max(rooms), sampling=sampling, seed=seed):
            for row in sorted(running):
                if tokens[row] not in stop_ids:
                    completions[row].append(int(tokens[row]))
                if tokens[row] in stop_ids or len(completions[row]) == rooms[row]:
                    running.remove(row)
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
        """Yields the next token of every prompt, int32 `[prompts]`, `max_new_tokens` times.

        The draws of a prompt follow from `seed` and the prompt, so they are those that it gets alone; the second of
        equal prompts is another sample.
        """
        sampling = sampling or Sampling()
        longest = bucket(max(len(prompt) for prompt in prompts))
        front = self._lm.prompt_tokens
        slots = front + bucket(longest + max_new_tokens)
        tokens = np.zeros((len(prompts), longest), np.int32)
        # Prompts end together: padding stands on the left, in a segment of its own that no token looks at.
        segments = np.ones((len(prompts), slots), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
            segments[row, front : front + longest - len(prompt)] = 0
        segments[:, :front] = VIRTUAL
        padding = np.array([[longest - len(prompt)] for prompt in prompts], np.int32)
        copies = np.array([prompts[:row].count(prompt) for row, prompt in enumerate(prompts)])
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(copies)
        rows = Rows(jnp.asarray(segments), jnp.asarray(padding), keys)
        cache, none = self._lm.new_cache(len(prompts), slots), jnp.int32(0)
        seen = jnp.zeros((len(prompts), self._lm.vocab_padded), bool) if sampling.repetition_penalty != 1 else None
        progress = Progress(cache, none, none + 0, seen)

        new, progress = self.advance(params, jnp.asarray(tokens), rows, progress, sampling=sampling, begins=True)
        for _ in range(max_new_tokens - 1):
            # The device computes the next token while this one is read.
            following, progress = self.advance(params, new[:, None], rows, progress, sampling=sampling)
            yield np.asarray(new)
            new = following
        yield np.asarray(new)


def bucket(length: int) -> int:
    """`length`, rounded up to one of four sizes between powers of two: few programs, at most a quarter wasted."""
    step = max(8, 1 << max(length - 1, 7).bit_length() - 3)
    return -(-length // step) * step


def _advance(
    lm: LM,
    params: Params,
    tokens: jax.Array,
    rows: Rows,
    progress: Progress,
    *,
    sampling: Sampling,
    begins: bool = False,
) -> tuple[jax.Array, Progress]:
    """The token after `tokens` `[B, T]`, which go into the cache behind those that are there.

    begins: whether they are the first, and stand behind the virtual tokens of a prompt where there are any.
    """
    written = tokens.shape[1] + (lm.prompt_tokens if begins else 0)
    ahead = progress.offset + (written - tokens.shape[1]) - lm.prompt_tokens
    slots = ahead + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.maximum(slots - rows.padding, 0)
    ctx = lm.context(positions, cache=CachePosition(progress.offset, rows.segments), begins=begins)
    x, _, cache = lm.hidden(params, tokens, ctx, cache=progress.cache)
    assert cache is not None
    seen = progress.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens))[:, None], tokens].max(slots >= rows.padding)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, progress.drawn)
    new = draw(lm.head(params, x[:, -1:])[:, 0], keys, sampling, seen)
    return new, Progress(cache, progress.offset + written, progress.drawn + 1, seen)
