"""Mixtures: how often the rows of each source come, and where among those of the others."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.rows.order import Purpose, permutation
from jaxllm.data.rows.pack import PackPlan, join


class Part(NamedTuple):
    """One source of a mixture: its rows are `first : first + rows` of the plan, with `tokens` tokens in all, and
    `taken` of them, or of their repetitions, stand in an epoch."""

    name: str
    first: int
    rows: int
    tokens: int
    taken: int

    @property
    def tokens_taken(self) -> float:
        """The tokens of this source in an epoch, on average over epochs."""
        return self.taken * self.tokens / self.rows


class Mixed:
    """`part.taken` rows of each part an epoch, spread evenly among those of the others.

    The rows of a part come in passes, each a permutation of them all; an epoch goes on in the pass where the one
    before it stopped. So a part that is larger than its share is seen over several epochs, each row once before
    any comes again, and one that is smaller is seen several times in one.

    Row j of a part's n in an epoch stands at (j + 1/2) / n of it: among the first m rows, of N, are m·n / N of
    that part, give or take half a row for each part.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self._parts = parts
        self._seed = seed
        when = np.concatenate([(np.arange(part.taken) + 0.5) / part.taken for part in parts])
        self._by_time = np.argsort(when, kind="stable")

    def __len__(self) -> int:
        return len(self._by_time)

    def __call__(self, epoch: int) -> np.ndarray:
        return np.concatenate([self._next(number, epoch) for number in range(len(self._parts))])[self._by_time]

    def _next(self, number: int, epoch: int) -> np.ndarray:
        """The rows of part `number` in `epoch`, in their order, int64 [taken]."""
        part = self._parts[number]
        first = epoch * part.taken
        passes = range(first // part.rows, (first + part.taken - 1) // part.rows + 1)
        rows = [permutation(part.rows, self._seed, Purpose.PASS, number, each) for each in passes]
        start = first - passes.start * part.rows
        return part.first + np.concatenate(rows)[start : start + part.taken]

    def __str__(self) -> str:
        whole = sum(part.tokens_taken for part in self._parts)
        shares = ", ".join(
            f"{part.tokens_taken / whole:.1%} of the tokens from {part.name}, seen {part.taken / part.rows:.3g} times"
            for part in self._parts
        )
        return f"an epoch of {len(self):,} rows has {shares}"


def mix(plans: Sequence[PackPlan], names: Sequence[str], weights: Sequence[float], seed: int) -> PackPlan:
    """The rows of several sources, each row of one source, so mixed that weights are proportions of tokens.

    Of the tokens of an epoch, padding not counted and prompts counted, source s has the share weights[s] /
    sum(weights), to the nearest row and at least one row. An epoch has as many tokens as all `plans` together;
    so with weights in proportion to the sources' tokens it is every row once.
    """
    rows = [plan.rows for plan in plans]
    tokens = [int(plan.piece_size.sum()) for plan in plans]
    first = np.cumsum([0, *rows[:-1]]).tolist()
    wanted = np.array(weights) / sum(weights) * sum(tokens)
    taken = np.maximum(1, np.round(wanted / np.array(tokens) * np.array(rows))).astype(int).tolist()
    parts = [Part(*facts) for facts in zip(names, first, rows, tokens, taken, strict=True)]
    return join(plans, Mixed(parts, seed))
