"""What people look at before the first step: one sample with its trained tokens marked. And what must not go on."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import describe_origin
from jaxllm.data.rows.pack import PackPlan
from jaxllm.data.rows.store import Store
from jaxllm.data.text.tokenize import NEVER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN, CLOSE = "⟦", "⟧"
LONGEST = 400  # characters of one stretch of equal tokens …
KEPT = 150  # … and how many of a longer one are shown at its beginning and its end
MOST = 4000  # characters in all


def preview(store: Store, plan: PackPlan, tokenizer: PreTrainedTokenizerFast) -> Text:
    """A sample of the first row of the first epoch, as far as its window reaches, for a terminal.

    Trained tokens stand in ⟦ ⟧ and are green where there are colours, special tokens are spelled out and bold. Long
    stretches are shortened.
    """
    ids, trained, where = _first_sample(store, plan)
    shown = Text(f"{where}: {trained.sum():,} of {len(ids):,} tokens are trained, those in {OPEN} {CLOSE}\n")
    special = np.isin(ids, [i for i, token in tokenizer.added_tokens_decoder.items() if token.special])
    marked, written = False, 0
    for (is_trained, is_special), text, place in _stretches(ids, trained, special, tokenizer):
        if written > MOST:
            shown.append(f"{CLOSE if marked else ''} … {len(ids) - place:,} more tokens")
            return shown
        style = f"{'green' if is_trained else ''}{' bold' if is_special else ''}".strip()
        mark = "" if is_trained == marked else OPEN if is_trained else CLOSE
        shown.append(mark, "green").append(_shortened(text), style)
        marked, written = is_trained, written + min(len(text), LONGEST)
    shown.append(CLOSE if marked else "", "green").rstrip()
    return shown


def require_ends(store: Store, plan: PackPlan) -> None:
    """Raises UserError when samples have an end of a turn to train, and the window cuts all of them off."""
    first_end = store.first_end[plan.piece_sample]
    reached = (plan.piece_start < first_end) & (first_end <= plan.piece_start + plan.piece_size)
    if not reached.any() and (first_end != NEVER).any():
        raise UserError(
            f"each of {plan.samples:,} samples is cut before the first end of a turn, so the model would not learn to "
            f"stop. Raise data.seq_len, which is {plan.seq_len}; the shortest sample has "
            f"{store.lengths[plan.piece_sample].min():,} tokens"
        )


def _first_sample(store: Store, plan: PackPlan) -> tuple[np.ndarray, np.ndarray, str]:
    """Ids, which of them are trained, and where the sample stands."""
    pieces = plan.pieces_of(int(plan.order(0)[0]))
    for j in pieces:
        sample, start = int(plan.piece_sample[j]), int(plan.piece_start[j])
        ids, trained = store.sample(sample, start, start + int(plan.piece_size[j]) + 1)
        trained[0] = False  # nothing before it predicts it
        if trained.any() or j == pieces[-1]:
            return ids, trained, describe_origin(*store.origin(sample))
    raise AssertionError("a row has a piece")


def _stretches(ids: np.ndarray, trained: np.ndarray, special: np.ndarray, tokenizer: PreTrainedTokenizerFast):
    """Neighbours that are alike: `((trained, special), text, place of the first)` of each stretch."""
    flags = list(zip(trained.tolist(), special.tolist(), strict=True))
    end, before = 0, ""
    for alike, stretch in groupby(flags):
        place, end = end, end + len(list(stretch))
        # Decoded from the start on: some tokenizers drop the space in front of a text. A character that two stretches
        # share is shown in the one that it begins in.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield alike, text[len(before) :], place
        before = text


def _shortened(text: str) -> str:
    if len(text) > LONGEST:
        text = f"{text[:KEPT]} … {len(text) - 2 * KEPT:,} characters … {text[-KEPT:]}"
    return "".join(c if c.isprintable() else "↵\n" if c == "\n" else repr(c)[1:-1] for c in text)
