"""Which tokens stand in which row: a plan of integers, made once from the lengths of the samples and a seed.

A sample of n ids gives n − 1 pairs of a token and its target, and takes as many places of a row. A *piece* is
what one row holds of one sample. The pieces of one sample overlap by one id, so that every target stands in
exactly one piece.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.data.rows.best_fit import best_fit
from jaxllm.data.rows.order import Grouped, Order, Purpose, Shuffled, permutation
from jaxllm.data.rows.store import Store

Packing = Literal["best_fit", "concat", "none", "grouped"]
LongSamples = Literal["auto", "split", "cut", "drop", "error"]

BUCKETS = 4  # of length: seq_len, and halves of it down to an eighth


class _Pieces(NamedTuple):
    """Ids `start : start + size + 1` of `sample`; each int64 [pieces]."""

    sample: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def take(self, index: np.ndarray) -> "_Pieces":
        return _Pieces(self.sample[index], self.start[index], self.size[index])


@dataclass(frozen=True, eq=False)
class PackPlan:
    """The rows of a data set, and their order.

    Row i holds the pieces `row_ends[i - 1] : row_ends[i]` one after the other; piece j holds the ids
    `piece_start[j] : piece_start[j] + piece_size[j] + 1` of sample `piece_sample[j]`: `piece_size[j]` pairs.

    Attributes:
        seq_len: places in a row.
        widths: to how many places rows are padded, rising: a row to the least that holds it.
        order: epoch → the rows in the order of that epoch; `len(order)` of them.
        samples: how many samples have a place.
        split: how many of them are longer than a row and stand in several.
        cut: how many lost ids at their end, because they do not fit into a row.
        dropped: how many have no place, because no trained target is within a row's reach.
        too_long: how many have no place, because they are longer than a row.
        first_long: where the first of the samples cut, dropped or too long comes from; empty if there is none.
    """

    seq_len: int
    widths: tuple[int, ...]
    piece_sample: np.ndarray
    piece_start: np.ndarray
    piece_size: np.ndarray
    row_ends: np.ndarray
    order: Order
    samples: int
    split: int
    cut: int
    dropped: int
    too_long: int
    first_long: str

    @property
    def rows(self) -> int:
        return len(self.row_ends)

    @property
    def pieces(self) -> int:
        return len(self.piece_sample)

    @property
    def efficiency(self) -> float:
        """The share of places that hold a token and not padding."""
        return float(self.piece_size.sum()) / float(np.array(self.widths)[self.row_bucket].sum())

    def __str__(self) -> str:
        counts = (
            (self.split, "longer than the window, and split"),
            (self.cut, "cut at the end of the window"),
            (self.dropped, "dropped: nothing trained in the window"),
            (self.too_long, "left out: longer than the window"),
        )
        long = "".join(f"; {count:,} samples {what}" for count, what in counts if count)
        first = f" (the first: {self.first_long})" if self.first_long else ""
        tokens = " or ".join(map(str, self.widths))
        order = f"; {self.order}" if str(self.order) else ""
        return f"{self.rows:,} rows of {tokens} tokens, {self.efficiency:.1%} full{long}{first}{order}"

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """The tokens in each row, padding not counted: int64 [rows]."""
        return np.add.reduceat(self.piece_size, np.concatenate([[0], self.row_ends[:-1]]))

    @cached_property
    def row_bucket(self) -> np.ndarray:
        """Which of `widths` each row is padded to: int64 [rows]."""
        return np.searchsorted(self.widths, self.row_tokens)

    def width_of(self, rows: np.ndarray) -> int:
        """The places that hold each of `rows`; −1 among them is an empty row."""
        return self.widths[int(np.max(self.row_bucket[rows[rows >= 0]], initial=0))]

    def pieces_of(self, row: int) -> range:
        """The pieces in `row`."""
        return range(int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row]))

    def row(self, store: Store, i: int, width: int | None = None) -> dict[str, np.ndarray]:
        """Row `i` as arrays [width], default seq_len; places behind the last piece are 0. Row −1 is empty.

        `tokens`, `targets` int32; `loss_mask` float32, 1 where the target is trained; `positions` int32, from
        0 in each piece; `segments` int32, 1, 2, … by piece.
        """
        names = ("tokens", "targets", "loss_mask", "positions", "segments")
        arrays = {
            name: np.zeros(width or self.seq_len, np.float32 if name == "loss_mask" else np.int32) for name in names
        }
        if i < 0:
            return arrays
        place = 0
        for segment, j in enumerate(self.pieces_of(i), 1):
            size, start = int(self.piece_size[j]), int(self.piece_start[j])
            ids, trained = store.sample(int(self.piece_sample[j]), start, start + size + 1)
            here = slice(place, place + size)
            arrays["tokens"][here] = ids[:-1]
            arrays["targets"][here] = ids[1:]
            arrays["loss_mask"][here] = trained[1:]
            arrays["positions"][here] = np.arange(size)
            arrays["segments"][here] = segment
            place += size
        return arrays

    def origins(self, store: Store, i: int) -> list[tuple[str, int]]:
        """The file and record (see `Store.origin`) of each piece in row `i`."""
        return [store.origin(int(self.piece_sample[j])) for j in self.pieces_of(i)]


def plan(
    lengths: np.ndarray,
    *,
    seq_len: int,
    packing: Packing,
    seed: int,
    splittable: np.ndarray,
    first_trained: np.ndarray,
    origin: Callable[[int], str],
    samples: np.ndarray | None = None,
    long_samples: LongSamples = "auto",
) -> PackPlan:
    """Packs samples into rows of `seq_len` pairs.

    `none`: one sample a row. `grouped`: the same, the shortest first, and padded to the least that holds it of
    seq_len and some halves of it. `best_fit`: whole samples, by best-fit decreasing. `concat`: all samples in a
    random order in one stream, cut at row borders.

    What is longer than a row is split into consecutive pieces, cut at its end (and dropped if its first trained
    target was cut off), left out, or an error. `auto` splits what is splittable, and all with `concat`, and cuts
    the rest.

    Args:
        lengths: int64 [n], ids of each sample.
        splittable: bool [n].
        first_trained: int64 [n], the place of each sample's first trained target.
        origin: where a sample comes from, for people.
        samples: which samples to pack, default all n.

    Raises UserError when no sample has a place, and when one is too long and must not be.
    """
    chosen = np.arange(len(lengths)) if samples is None else np.asarray(samples, np.int64)
    pairs = np.maximum(lengths[chosen] - 1, 0)
    long = pairs > seq_len
    if long_samples == "error" and long.any():
        first = int(chosen[np.argmax(long)])
        raise UserError(
            f"{origin(first)} has {lengths[first]:,} tokens, and a row of data.seq_len = {seq_len} holds "
            f"{seq_len + 1:,}; {int(long.sum()):,} of {len(chosen):,} samples are too long. Raise data.seq_len, or set "
            "data.long_samples to split, cut or drop"
        )
    by_default = splittable[chosen] | (packing == "concat")
    may_split = by_default if long_samples == "auto" else np.full(len(chosen), long_samples == "split")
    too_long = long & (long_samples == "drop")
    must_cut = long & ~may_split & ~too_long
    pairs = np.where(must_cut, seq_len, pairs)
    reached = first_trained[chosen] <= pairs
    kept = reached & ~too_long
    if not kept.any():
        raise UserError(
            f"none of {len(chosen):,} samples has a trained token within data.seq_len = {seq_len}"
            f"{' and is no longer than that' if too_long.any() else ''}; raise data.seq_len"
        )
    whole = _Pieces(chosen[kept], np.zeros(int(kept.sum()), np.int64), pairs[kept])
    whole = whole.take(permutation(len(whole.sample), seed, Purpose.PIECES))
    if packing == "concat":
        pieces, row_ends = _concat(whole, seq_len)
    else:
        pieces = _split_long(whole, seq_len)
        if packing == "grouped":
            pieces = pieces.take(np.argsort(pieces.size, kind="stable"))
        row_of_piece = best_fit(pieces.size, seq_len) if packing == "best_fit" else np.arange(len(pieces.size))
        by_row = np.argsort(row_of_piece, kind="stable")
        pieces = pieces.take(by_row)
        row_ends = np.cumsum(np.bincount(row_of_piece))
    lost = must_cut | too_long
    return PackPlan(
        seq_len=seq_len,
        widths=_widths(seq_len, pieces.size) if packing == "grouped" else (seq_len,),
        piece_sample=pieces.sample,
        piece_start=pieces.start,
        piece_size=pieces.size,
        row_ends=row_ends,
        order=Shuffled(len(row_ends), seed),
        samples=len(whole.sample),
        split=int((long & may_split).sum()),
        cut=int((must_cut & kept).sum()),
        dropped=int((~reached).sum()),
        too_long=int(too_long.sum()),
        first_long=origin(int(chosen[np.argmax(lost)])) if lost.any() else "",
    )


def join(plans: Sequence[PackPlan], order: Order) -> PackPlan:
    """The rows of all `plans`, those of the first before those of the second, in another order."""
    pieces = np.cumsum([0, *(plan.pieces for plan in plans[:-1])])
    return PackPlan(
        seq_len=plans[0].seq_len,
        widths=tuple(sorted({width for plan in plans for width in plan.widths})),
        piece_sample=np.concatenate([plan.piece_sample for plan in plans]),
        piece_start=np.concatenate([plan.piece_start for plan in plans]),
        piece_size=np.concatenate([plan.piece_size for plan in plans]),
        row_ends=np.concatenate([plan.row_ends + before for plan, before in zip(plans, pieces, strict=True)]),
        order=order,
        samples=sum(plan.samples for plan in plans),
        split=sum(plan.split for plan in plans),
        cut=sum(plan.cut for plan in plans),
        dropped=sum(plan.dropped for plan in plans),
        too_long=sum(plan.too_long for plan in plans),
        first_long=next((plan.first_long for plan in plans if plan.first_long), ""),
    )


def group(plan: PackPlan, batch_size: int, seed: int) -> PackPlan:
    """The rows of a plan in batches of like length (see `Grouped`): all of a batch are padded to one of `widths`.

    A width of fewer rows than a batch is given up, and its rows are padded to the next.
    """
    widths: list[int] = []
    waiting = 0
    for width, rows in zip(plan.widths, np.bincount(plan.row_bucket), strict=True):
        waiting += int(rows)
        if waiting >= batch_size or width == plan.widths[-1]:
            widths.append(width)
            waiting = 0
    grouped = replace(plan, widths=tuple(widths))
    return replace(grouped, order=Grouped(plan.order, grouped.row_bucket, batch_size, seed))


def split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out `fraction` of n records at random: (train, held out), each int64 and sorted.

    At least one is held out. Raises UserError when one of the two would be empty.
    """
    held_out = max(1, round(n * fraction))
    if held_out >= n:
        raise UserError(
            f"data.eval_fraction = {fraction} of {n} different records leaves none to train on. "
            "Lower it, set a `separator` if one file holds many documents, or set it to 0"
        )
    order = permutation(n, seed, Purpose.SPLIT)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _split_long(whole: _Pieces, seq_len: int) -> _Pieces:
    count = -(-whole.size // seq_len)
    piece = np.repeat(np.arange(len(count)), count)
    ordinal = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count)
    start = ordinal * seq_len
    return _Pieces(whole.sample[piece], start, np.minimum(whole.size[piece] - start, seq_len))


def _concat(whole: _Pieces, seq_len: int) -> tuple[_Pieces, np.ndarray]:
    ends = np.cumsum(whole.size)
    borders = np.arange(seq_len, ends[-1], seq_len)
    stops = np.sort(np.concatenate([ends, borders]), kind="stable")  # two sorted runs: merged in linear time
    stops = stops[np.diff(stops, prepend=0) > 0]
    starts = np.concatenate([[0], stops[:-1]])
    sample = np.searchsorted(ends, starts, side="right")
    pieces = _Pieces(whole.sample[sample], starts - (ends - whole.size)[sample], stops - starts)
    row_ends = np.searchsorted(stops, np.append(borders, ends[-1])) + 1
    return pieces, row_ends


def _widths(seq_len: int, sizes: np.ndarray) -> tuple[int, ...]:
    """seq_len and halves of it, as far as they are whole, that some of `sizes` are padded to."""
    halves = [seq_len >> i for i in range(BUCKETS) if seq_len % (1 << i) == 0]
    widths = np.array(halves[::-1])
    return tuple(widths[np.unique(np.searchsorted(widths, sizes))].tolist())
