"""From segments to token ids, and which of them are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.data.template import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sample(NamedTuple):
    """Token ids, int32 [n], and whether each of them is trained as a target, bool [n]."""

    ids: np.ndarray
    trained: np.ndarray


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
        self._tested_characters: set[str] = set()

    def encode(self, records: Sequence[Sequence[Segment]], *, document: bool) -> list[Sample]:
        """One sample a record. The segments of a record are joined, then tokenized once.

        A token is trained if it holds a character of a trained segment; a token that holds no character is as
        the character that follows. With `document`, the special tokens that the tokenizer puts in front of a
        text stay, untrained; those that it puts behind make way for one EOS, trained if anything else is.
        Raises UserError for a document when the tokenizer has no EOS, and when offsets cannot be trusted.
        """
        eos = self._tokenizer.eos_token_id
        if document and eos is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every document; "
                "set `eos_token` in its tokenizer_config.json"
            )
        texts = ["".join(segment.text for segment in segments) for segments in records]
        mixed = [len({segment.trained for segment in segments if segment.text}) > 1 for segments in records]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=document,
            # A chat template writes special tokens into the text; in a document the tokenizer decides.
            split_special_tokens=self._tokenizer.split_special_tokens and document,
            return_special_tokens_mask=True,
            return_offsets_mapping=any(mixed),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        samples = []
        for i, segments in enumerate(records):
            added = np.array(encoded["special_tokens_mask"][i], bool)
            all_ids = np.array(encoded["input_ids"][i], np.int32)
            ids = all_ids[~added]
            if mixed[i]:
                self._require_exact_offsets(texts[i])
                trained = _trained(segments, np.array(encoded["offset_mapping"][i], np.int64)[~added])
            else:
                trained = np.full(len(ids), any(segment.trained for segment in segments if segment.text))
            if document and len(ids):
                front = all_ids[: int(np.argmin(added))]
                ids = np.concatenate([front, ids, np.array([eos], np.int32)])
                trained = np.concatenate([np.zeros(len(front), bool), trained, [trained.any()]])
            samples.append(Sample(ids, trained))
        return samples

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


def _trained(segments: Sequence[Segment], offsets: np.ndarray) -> np.ndarray:
    """bool [n]: which tokens, at the characters `offsets` [n, 2] of the joined segments, are trained."""
    flags = np.repeat([segment.trained for segment in segments], [len(segment.text) for segment in segments])
    trained_before = np.concatenate([[0], np.cumsum(flags)])
    starts = np.minimum(offsets[:, 0], len(flags) - 1)
    ends = np.maximum(offsets[:, 1], starts + 1)
    return trained_before[ends] > trained_before[starts]
