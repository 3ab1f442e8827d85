"""Completions and replies on the terminal, as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.data.text.tokenize import parts_from_the_next_word, prompt_ids
from jaxllm.generate.chat import Conversation
from jaxllm.generate.decode import Decoder
from jaxllm.generate.sample import Sampling
from jaxllm.generate.text import Completion
from jaxllm.models.lm import LM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEPARATOR = f"\n{'-' * 60}\n"
SEEDS = 1 << 32


class Writer:
    """Writes what `lm` with `params` says to the standard output, and remarks to the standard error.

    stop_ids, stop: tokens and texts that end a completion. max_new_tokens: what it has at most. max_length: what the
    prompt and it have together at most, where max_new_tokens is None. seed: of the samples.
    """

    def __init__(
        self,
        lm: LM,
        params: Params,
        tokenizer: PreTrainedTokenizerFast,
        *,
        sampling: Sampling,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        max_new_tokens: int | None,
        max_length: int | None = None,
        seed: int,
    ) -> None:
        self._params = params
        self._tokenizer: Any = tokenizer
        self._sampling = sampling
        self._stop_ids = list(stop_ids)
        self._stop = list(stop)
        self._max_new_tokens = max_new_tokens
        self._max_length = max_length
        self._seed = seed
        self._longest = lm.config.longest
        self._decoder = Decoder(lm)

    def complete(self, texts: Sequence[str]) -> None:
        """Writes each text with its completion; a single one as it comes."""
        prompts = [prompt_ids(self._tokenizer, text) for text in texts]
        for text in texts:
            if parts_from_the_next_word(self._tokenizer, text):
                print(
                    f"note: the prompt {text[-30:]!r} ends in white space, which the tokenizer joins to the next word: "
                    "the model has hardly seen it alone. Leave it out",
                    file=sys.stderr,
                )
        completions = [self._completion(prompt) for prompt in prompts]
        if len(texts) == 1:
            _show(texts[0])
            for piece in self._decode(prompts, completions, self._seed):
                _show(piece)
        else:
            for _ in self._decode(prompts, completions, self._seed):
                pass
            _show(SEPARATOR.join(text + done.text for text, done in zip(texts, completions, strict=True)))
        self._end(prompts, completions)

    def talk(self, conversation: Conversation) -> None:
        """Replies to each line of the standard input, until it ends."""
        self._stop_ids += conversation.stop_ids
        self._stop += conversation.stop
        for turn, said in enumerate(_lines()):
            prompt = conversation.ask(said)
            reply = self._completion(prompt)
            try:
                for piece in self._decode([prompt], [reply], (self._seed + turn) % SEEDS):
                    _show(piece)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
            self._end([prompt], [reply])
            conversation.answered(reply.text)

    def _completion(self, prompt: list[int]) -> Completion:
        room = self._decoder.room(prompt, self._wanted(prompt))
        return Completion(self._tokenizer, prompt, room=room, stop_ids=self._stop_ids, stop=self._stop)

    def _wanted(self, prompt: list[int]) -> int:
        """How many new tokens the settings allow."""
        if self._max_new_tokens is not None:
            return self._max_new_tokens
        assert self._max_length is not None
        if (left := self._max_length - len(prompt)) < 1:
            raise UserError(
                f"a prompt has {len(prompt):,} tokens, and the model's generation_config.json says max_length = "
                f"{self._max_length:,} for prompt and completion together; give --max-new-tokens"
            )
        return left

    def _decode(self, prompts: list[list[int]], completions: Sequence[Completion], seed: int) -> Iterator[str]:
        """Fills the completions. Yields each piece of their text."""
        steps = self._decoder.stream(
            self._params,
            prompts,
            max_new_tokens=max(completion.room for completion in completions),
            sampling=self._sampling,
            seed=seed,
        )
        for tokens in steps:
            for completion, token in zip(completions, tokens, strict=True):
                if completion.ended is None:
                    yield completion.push(int(token))
            if all(completion.ended for completion in completions):
                return

    def _end(self, prompts: list[list[int]], completions: Sequence[Completion]) -> None:
        _show("\n")
        for prompt, completion in zip(prompts, completions, strict=True):
            if completion.ended == "length" and len(prompt) + completion.room == self._longest:
                print(f"note: ended at the last of the model's {self._longest:,} positions", file=sys.stderr)


def _lines() -> Iterator[str]:
    """The lines of the standard input that say something; a terminal is asked for them."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            _show("\n")
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the standard input is not valid UTF-8 ({error})") from None
        if not line and not asks:
            return
        if line.strip():
            yield line.strip()


def _show(text: str) -> None:
    print(text, end="", flush=True)
