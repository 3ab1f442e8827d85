"""Which tokens stand in which row: a plan of integers, made once from the lengths of the samples and a seed.

A sample of n ids gives n − 1 pairs of a token and its target, and takes as many places of a row. A *piece* is
what one row holds of one sample. The pieces of one sample overlap by one id, so that every target stands in
exactly one piece.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.data.store import Store

Packing = Literal["best_fit", "concat", "none"]

# What a random permutation is for; permutations for different purposes are independent under one seed.
_SPLIT, _PIECES, _EPOCH = range(3)


class _Pieces(NamedTuple):
    """Ids `start : start + size + 1` of `sample`; each int64 [pieces]."""

    sample: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def take(self, index: np.ndarray) -> "_Pieces":
        return _Pieces(self.sample[index], self.start[index], self.size[index])


@dataclass(frozen=True, eq=False)
class PackPlan:
    """The rows of a data set.

    Row i holds the pieces `row_ends[i - 1] : row_ends[i]` one after the other; piece j holds the ids
    `piece_start[j] : piece_start[j] + piece_size[j] + 1` of sample `piece_sample[j]`: `piece_size[j]` pairs.

    Attributes:
        seq_len: places in a row.
        seed: of the order of rows.
        samples: how many samples have a place.
        cut: how many lost ids at their end, because they do not fit into a row and must not be split.
        dropped: how many have no place, because no trained target is within a row's reach.
    """

    seq_len: int
    seed: int
    piece_sample: np.ndarray
    piece_start: np.ndarray
    piece_size: np.ndarray
    row_ends: np.ndarray
    samples: int
    cut: int
    dropped: int

    @property
    def rows(self) -> int:
        return len(self.row_ends)

    @property
    def pieces(self) -> int:
        return len(self.piece_sample)

    @property
    def efficiency(self) -> float:
        """The share of places that hold a token and not padding."""
        return float(self.piece_size.sum()) / (self.rows * self.seq_len)

    def __str__(self) -> str:
        lost = "".join(
            f"; {count:,} samples {what}"
            for count, what in (
                (self.cut, "cut at the end of the window"),
                (self.dropped, "dropped: nothing trained in the window"),
            )
            if count
        )
        return f"{self.rows:,} rows of {self.seq_len} tokens, {self.efficiency:.1%} full{lost}"

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """The tokens in each row, padding not counted: int64 [rows]."""
        return np.add.reduceat(self.piece_size, np.concatenate([[0], self.row_ends[:-1]]))

    def order(self, epoch: int) -> np.ndarray:
        """The rows in the order of `epoch`, int64 [rows]: a permutation, given by (seed, epoch) alone."""
        return _permutation(self.rows, self.seed, _EPOCH, epoch)

    def pieces_of(self, row: int) -> range:
        """The pieces in `row`."""
        return range(int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row]))

    def row(self, store: Store, i: int) -> dict[str, np.ndarray]:
        """Row `i` as arrays [seq_len]; places behind the last piece are 0 in each of them.

        `tokens`, `targets` int32; `loss_mask` float32, 1 where the target is trained; `positions` int32, from
        0 in each piece; `segments` int32, 1, 2, … by piece.
        """
        arrays = self.empty_row()
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

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of padding alone."""
        names = ("tokens", "targets", "loss_mask", "positions", "segments")
        return {name: np.zeros(self.seq_len, np.float32 if name == "loss_mask" else np.int32) for name in names}

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
    samples: np.ndarray | None = None,
) -> PackPlan:
    """Packs samples into rows of `seq_len` pairs.

    `none`: one sample a row. `best_fit`: whole samples, by best-fit decreasing. Both split a splittable
    sample that is longer than the window into consecutive pieces; any other is cut at its end, and dropped
    if its first trained target was cut off. `concat`: all samples in a random order in one stream, cut at
    row borders.

    Args:
        lengths: int64 [n], ids of each sample.
        splittable: bool [n].
        first_trained: int64 [n], the place of each sample's first trained target.
        samples: which samples to pack, default all n.

    Raises UserError when no sample has a place.
    """
    chosen = np.arange(len(lengths)) if samples is None else np.asarray(samples, np.int64)
    pairs = np.maximum(lengths[chosen] - 1, 0)
    must_cut = (pairs > seq_len) & ~splittable[chosen] & (packing != "concat")
    pairs = np.where(must_cut, seq_len, pairs)
    kept = first_trained[chosen] <= pairs
    if not kept.any():
        raise UserError(
            f"none of {len(chosen):,} samples has a trained token within data.seq_len = {seq_len}; raise data.seq_len"
        )
    whole = _Pieces(chosen[kept], np.zeros(int(kept.sum()), np.int64), pairs[kept])
    whole = whole.take(_permutation(len(whole.sample), seed, _PIECES))
    if packing == "concat":
        pieces, row_ends = _concat(whole, seq_len)
    else:
        pieces = _split_long(whole, seq_len)
        row_of_piece = np.arange(len(pieces.size)) if packing == "none" else best_fit(pieces.size, seq_len)
        by_row = np.argsort(row_of_piece, kind="stable")
        pieces = pieces.take(by_row)
        row_ends = np.cumsum(np.bincount(row_of_piece))
    return PackPlan(
        seq_len=seq_len,
        seed=seed,
        piece_sample=pieces.sample,
        piece_start=pieces.start,
        piece_size=pieces.size,
        row_ends=row_ends,
        samples=len(whole.sample),
        cut=int((must_cut & kept).sum()),
        dropped=int((~kept).sum()),
    )


def split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out `fraction` of n samples at random: (train, held out), each int64 and sorted.

    At least one sample is held out. Raises UserError when one of the two would be empty.
    """
    held_out = max(1, round(n * fraction))
    if held_out >= n:
        raise UserError(
            f"data.eval_fraction = {fraction} of {n} samples leaves none to train on. "
            "Lower it, set a `separator` if one file holds many documents, or set it to 0"
        )
    order = _permutation(n, seed, _SPLIT)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing bin packing: the bin of each item, int64 [n], bins counted from 0.

    Items come in order of falling size, and each goes into the bin with the least room that still holds it.
    Bins with equal room are alike, and so are items of equal size: both are handled in groups, which takes
    O(n + capacity²) array steps at the very worst, and nearer to O(n + capacity) on real lengths.
    """
    items = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    bins_by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    has_bins = np.zeros(capacity + 1, bool)
    assigned = np.empty(len(sizes), np.int64)
    opened = done = 0

    def put(room: int, bins: np.ndarray) -> None:
        if len(bins):
            bins_by_room[room].append(bins)
            has_bins[room] = True

    for size in np.flatnonzero(counts)[::-1]:
        left = int(counts[size])
        while left:
            room = size + int(np.argmax(has_bins[size:]))
            if has_bins[room]:
                bins = np.concatenate(bins_by_room[room])
                bins_by_room[room], has_bins[room] = [], False
            else:
                room = capacity
                bins = np.arange(opened, opened - (-left // (capacity // size)))
                opened += len(bins)
            each = room // size  # the bin just used has the least room of all, until it is too full
            full, rest = divmod(min(left, each * len(bins)), each)
            used = full * each + rest
            assigned[items[done : done + used]] = np.repeat(bins, each)[:used]
            put(room - each * size, bins[:full])
            if rest:
                put(room - rest * size, bins[full : full + 1])
            put(room, bins[full + bool(rest) :])
            done, left = done + used, left - used
    return assigned


def _split_long(whole: _Pieces, seq_len: int) -> _Pieces:
    count = -(-whole.size // seq_len)
    piece = np.repeat(np.arange(len(count)), count)
    ordinal = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count)
    start = ordinal * seq_len
    return _Pieces(whole.sample[piece], start, np.minimum(whole.size[piece] - start, seq_len))


def _concat(whole: _Pieces, seq_len: int) -> tuple[_Pieces, np.ndarray]:
    ends = np.cumsum(whole.size)
    borders = np.arange(seq_len, ends[-1], seq_len)
    stops = np.union1d(ends, borders)
    starts = np.concatenate([[0], stops[:-1]])
    sample = np.searchsorted(ends, starts, side="right")
    pieces = _Pieces(whole.sample[sample], starts - (ends - whole.size)[sample], stops - starts)
    row_ends = np.searchsorted(stops, np.append(borders, ends[-1])) + 1
    return pieces, row_ends


def _permutation(n: int, *key: int) -> np.ndarray:
    # numpy promises the bits of its bit generators for all versions, but not those of `permutation`.
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")
