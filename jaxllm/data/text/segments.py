"""What a record becomes before it is tokenized: stretches of text, each trained or only read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text whose tokens are all trained, or all only read.

    `ends`: the text is the mark by which a turn ends; where it is trained, the model learns to stop.
    """

    text: str
    trained: bool
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A sample to be tokenized: `segments` follow each other directly.

    `document`: the tokenizer's own special tokens go in front and a trained EOS behind; otherwise the text holds
    its special tokens already.
    `splittable`: a sample longer than the window is trained in consecutive pieces; otherwise it is cut.
    `exact`: no token may hold both trained text and text that is only read, and what stands before a trained stretch
    must have the tokens that it has alone, as when the model is asked for the answer. Without, a token over a border
    is trained.
    """

    segments: tuple[Segment, ...]
    document: bool = True
    splittable: bool = False
    exact: bool = False

    def __str__(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def answers(self) -> Iterator[int]:
        """The characters at which trained text follows text that is only read."""
        place, before = 0, True
        for segment in self.segments:
            if segment.text:
                if segment.trained and not before:
                    yield place
                place, before = place + len(segment.text), segment.trained


@dataclass(frozen=True, eq=False, slots=True)
class Tokens:
    """A sample that comes tokenized: ids int64 [n], and whether each of them is trained as a target, bool [n].

    `masked`: some are not.
    """

    ids: np.ndarray
    trained: np.ndarray
    masked: bool

    @property
    def splittable(self) -> bool:
        return not self.masked


Rendered = Text | Tokens
