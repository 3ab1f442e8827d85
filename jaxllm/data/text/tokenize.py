"""From rendered records to token ids, and which of them are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.data.text.segments import Rendered, Segment, Text, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_REMEMBERED = 1000  # prompts, which are mostly the few words that open a turn
_READ, _COMPARED = 24, 4  # how many tokens at the end of a prompt are read alone, and how many of them must be alike
NEVER = -1  # the place of an end mark that is not there


class Sample(NamedTuple):
    """Token ids, int32 [n], and whether each of them is trained as a target, bool [n]."""

    ids: np.ndarray
    trained: np.ndarray


class Encoded(NamedTuple):
    """A sample, and what is to be known about its mask.

    `end`: the place of the first trained token that ends a turn or the text, or `NEVER`.
    `torn`: the text must be read exactly, and it is not (see `Text.exact`).
    `joined`: of a text that need not be, the first character of a trained stretch before which the model, asked for
    it, is given other tokens than it was trained behind; or `NEVER`.
    """

    sample: Sample
    end: int
    torn: bool = False
    joined: int = NEVER


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides which ids a text gets, the chat template included."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Earlier calls leave these two in the tokenizer; they do not act here.
    state["truncation"] = state["padding"] = None
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    facts = [state, tokenizer.chat_template, special]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Encoder:
    """Tokenizes rendered records with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)
        self._special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._tested_characters: set[str] = set()
        self._read: dict[str, list[int]] = {}

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """The samples in order. The segments of a text are joined, then tokenized once.

        A token is trained if it holds a character of a trained segment; a token that holds no character is as
        the character that follows, and a token added to the vocabulary, which may swallow white space beside it, is
        as its first one. Of a document, the special tokens that the tokenizer puts in front stay, untrained, unless
        the text begins with them itself; those that it puts behind make way for one EOS, trained if anything else
        is.
        Raises UserError for a document when the tokenizer has no EOS, and when offsets cannot be trusted.
        """
        encoded: list[Encoded | None] = [self._ready(r) if isinstance(r, Tokens) else None for r in rendered]
        for document in (True, False):
            places = [i for i, r in enumerate(rendered) if isinstance(r, Text) and r.document is document]
            texts = [text for i in places if isinstance(text := rendered[i], Text)]
            for i, result in zip(places, self._encode(texts, document) if texts else [], strict=True):
                encoded[i] = result
        return [result for result in encoded if result is not None]

    def _ready(self, tokens: Tokens) -> Encoded:
        ids, trained = tokens.ids.astype(np.int32), tokens.trained
        ends = trained & ((ids == self._tokenizer.eos_token_id) | (np.isin(ids, self._special) & _last_of_run(trained)))
        return Encoded(Sample(ids, trained), _first(ends))

    def _encode(self, texts: list[Text], document: bool) -> list[Encoded]:
        eos = self._tokenizer.eos_token_id
        if document and eos is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every document; "
                "set `eos_token` in its tokenizer_config.json"
            )
        joined = [str(text) for text in texts]
        mixed = [len({(s.trained, s.ends) for s in text.segments if s.text}) > 1 for text in texts]
        encoded = self._tokenizer(
            joined,
            add_special_tokens=document,
            # A chat template writes special tokens into the text; in a document the tokenizer decides.
            split_special_tokens=self._tokenizer.split_special_tokens and document,
            return_special_tokens_mask=True,
            return_offsets_mapping=any(mixed),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        results: list[Encoded] = []
        for i, text in enumerate(texts):
            added = np.array(encoded["special_tokens_mask"][i], bool)
            all_ids = np.array(encoded["input_ids"][i], np.int32)
            ids = all_ids[~added]
            torn, border = False, NEVER
            if mixed[i]:
                self._require_exact_offsets(joined[i])
                offsets = np.array(encoded["offset_mapping"][i], np.int64).reshape(-1, 2)[~added]
                trained, ends, torn = self._masks(text.segments, ids, offsets)
                torn = text.exact and (torn or not self._asked_alike(text, ids, offsets))
                border = NEVER if text.exact else self._joined(text, ids, offsets)
            else:
                trained = np.full(len(ids), any(segment.trained for segment in text.segments if segment.text))
                ends = np.full(len(ids), any(segment.ends for segment in text.segments if segment.text)) & trained
            if document and len(ids):
                front = all_ids[: int(np.argmin(added))]
                front = front[:0] if np.array_equal(ids[: len(front)], front) else front
                back = np.array([] if ids[-1] == eos else [eos], np.int32)
                ids = np.concatenate([front, ids, back])
                trained = np.concatenate([np.zeros(len(front), bool), trained, np.full(len(back), trained.any())])
                ends = trained & (ids == eos)
            results.append(Encoded(Sample(ids, trained), _first(ends), torn, border))
        return results

    def _masks(
        self, segments: Sequence[Segment], ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Which tokens, at the characters `offsets` [n, 2] of the joined segments, are trained, which of these
        belong to an end mark, and whether any holds trained text and other text."""
        lengths = [len(segment.text) for segment in segments]
        first = np.minimum(offsets[:, 0], sum(lengths) - 1)
        last = np.where(np.isin(ids, self._added), first + 1, np.maximum(offsets[:, 1], first + 1))
        trained = _characters([segment.trained for segment in segments], lengths, first, last)
        ends = _characters([segment.ends for segment in segments], lengths, first, last)
        torn = (trained > 0) & (trained < last - first)
        return trained > 0, (trained > 0) & (ends > 0), bool(torn.any())

    def _asked_alike(self, text: Text, ids: np.ndarray, offsets: np.ndarray) -> bool:
        """Whether what stands before each trained stretch has the same tokens when nothing follows it, as it does
        when the model is asked for the answer."""
        written = str(text)
        return all(self._is_read_alike(written, place, ids, offsets) for place in text.answers())

    def _joined(self, text: Text, ids: np.ndarray, offsets: np.ndarray) -> int:
        """The first answer whose prompt, read alone, does not end with the tokens that are before the answer."""
        written = str(text)
        for place in text.answers():
            stop = int(np.searchsorted(offsets[:, 0], place))
            # A token over the border is trained, and the prompt may end before it: some tokenizers drop a last space.
            stops = (stop, stop - 1) if stop and offsets[stop - 1, 1] > place else (stop,)
            # What is far before the answer mostly decides nothing; where it seems to, the whole prompt tells.
            for start in (int(offsets[stop - _READ, 0]) if stop > _READ else 0, 0):
                alone = self._tokenizer.backend_tokenizer.encode(written[start:place], add_special_tokens=False).ids
                if any(alone[-_COMPARED:] == ids[max(end - _COMPARED, 0) : end].tolist() for end in stops):
                    break
            else:
                return place
        return NEVER

    def _is_read_alike(self, text: str, end: int, ids: np.ndarray, offsets: np.ndarray) -> bool:
        # A token added to the vocabulary stands by itself: what is before it decides nothing behind it.
        stop = int(np.searchsorted(offsets[:, 0], end))
        start = int(np.max(np.flatnonzero(np.isin(ids[:stop], self._added)), initial=0))
        alone = text[offsets[start, 0] if start else 0 : end]
        if alone not in self._read:
            if len(self._read) > _REMEMBERED:
                self._read.clear()
            self._read[alone] = self._tokenizer.backend_tokenizer.encode(alone, add_special_tokens=False).ids
        return self._read[alone] == ids[start:stop].tolist()

    def _require_exact_offsets(self, text: str) -> None:
        # A BPE model without an unknown token and without byte pieces drops a character that it does not
        # know, and the offsets of everything behind it in the word are then too small.
        for character in set(text) - self._tested_characters:
            if self._end_of("aa") == 2 and self._end_of(f"a{character}a") != 3:
                raise UserError(
                    f"the tokenizer drops the character {character!r} without a trace, so which tokens are "
                    "trained cannot be told. Give the tokenizer an unknown token or byte pieces, or remove "
                    "the character from the data"
                )
            self._tested_characters.add(character)

    def _end_of(self, text: str) -> int:
        offsets = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets[-1][1] if offsets else 0


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens with which a document that begins with `text` begins, as `Encoder` writes it.

    The special tokens that the tokenizer puts in front stay, unless the text begins with them itself; those that it
    puts behind would end the text, and are left out.
    """

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
        return encoded["input_ids"], encoded["special_tokens_mask"]

    some, added = encode("a")
    front = some[: added.index(0)]
    ids = [token for token, special in zip(*encode(text), strict=True) if not special]
    return ids if ids[: len(front)] == front else front + ids


def parts_from_the_next_word(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether `text` ends in white space that becomes part of another token once a word follows it."""
    if text.rstrip(" \t\u3000") == text:
        return False
    alone, followed = (
        tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"] for said in (text, text + "a")
    )
    return followed[: len(alone)] != alone


def _characters(flags: list[bool], lengths: list[int], first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """How many of the characters `first : last` of each token are in flagged segments, int64 [n]."""
    before = np.concatenate([[0], np.cumsum(np.repeat(np.array(flags, np.int64), lengths))])
    return before[last] - before[first]


def _last_of_run(flags: np.ndarray) -> np.ndarray:
    """bool [n]: where a stretch of true `flags` ends."""
    return flags & ~np.append(flags[1:], False)


def _first(flags: np.ndarray) -> int:
    # The first token is no target.
    return 1 + int(np.argmax(flags[1:])) if flags[1:].any() else NEVER
