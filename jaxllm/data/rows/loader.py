"""Batches: rows of a packing plan in the order of training, read ahead and placed on the devices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, NamedTuple, TypeVar

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from pydantic import Field, model_validator

from jaxllm.core.config import Section
from jaxllm.core.errors import UserError
from jaxllm.data.records.duplicates import held_out_groups
from jaxllm.data.records.source import SourceConfig, describe_origin
from jaxllm.data.rows import pack
from jaxllm.data.rows.mixture import mix
from jaxllm.data.rows.order import Shuffled
from jaxllm.data.rows.pack import LongSamples, Packing, PackPlan
from jaxllm.data.rows.store import Store

T = TypeVar("T")
Arrays = dict[str, np.ndarray]

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches read ahead on the host
PLACED_AHEAD = 2  # batches on the devices before they are asked for
ENDLESS = 1 << 62
LONGEST_ROW = 1 << 24  # tokens; the longest contexts that models are published with have 10 million


class DataConfig(Section):
    """What is trained on."""

    sources: list[SourceConfig] = Field(min_length=1)
    """where records come from; without weights they are all shuffled together"""
    seq_len: int = Field(ge=1, le=LONGEST_ROW)
    """tokens in a row"""
    packing: Packing = "best_fit"
    """how samples share rows: best_fit (whole samples), concat (one stream, cut at the borders of rows), none (one
    sample a row) or grouped (one sample a row, and batches of like length, padded to seq_len or to a half, a quarter
    or an eighth of it, each a program of its own)"""
    long_samples: LongSamples = "auto"
    """what becomes of a sample that is longer than seq_len: split (over rows), cut (at its end), drop or error; auto:
    text is split, and with packing concat everything, the rest is cut"""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """the share of records that is held out for evaluation; records that say the same count as one"""

    @property
    def packed(self) -> bool:
        """Whether a row may hold several documents."""
        return self.packing in ("best_fit", "concat")

    @model_validator(mode="after")
    def _sound_mixture(self) -> "DataConfig":
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError(
                f"sources.{given.index(False)} has no weight and sources.{given.index(True)} has one; give a weight to "
                "all of the sources or to none"
            )
        if all(source.weight == 0 for source in self.sources):
            raise ValueError("every source has weight 0, so nothing would be trained on; give one a weight above 0")
        options = [source.model_dump(exclude={"weight"}) for source in self.sources]
        for i, same in enumerate(options):
            if same in options[:i]:
                raise ValueError(
                    f"sources.{options.index(same)} and sources.{i} are the same ({same['path']!r}); remove one. To "
                    "see its records more often than others, give every source a weight"
                )
        return self


HeldOutBy = Literal["samples", "records"]


def plans(
    config: DataConfig,
    store: Store,
    seed: int,
    batch_size: int,
    *,
    held_out_by: HeldOutBy = "records",
    among: np.ndarray | None = None,
) -> tuple[PackPlan, PackPlan | None]:
    """The rows to train on in batches of `batch_size`, and those held out, of the sources' `store`.

    Nothing is held out when `config.eval_fraction` is 0. Otherwise that share of all records is, or of each source's
    records where sources have weights. All samples of a record are on one side, and so are records that say the same.

    Args:
        held_out_by: samples: each by itself, as earlier versions drew them.
        among: the samples to take, of sources without weights; default: all.

    Raises UserError when either would be empty.
    """
    weighted = [(i, source) for i, source in enumerate(config.sources) if source.weight]
    if not weighted:
        samples = np.arange(len(store)) if among is None else among
        train, held_out = _plans_of(samples, _drawn(config, store, seed, held_out_by, [samples]), config, store, seed)
    else:
        parts = []
        ends = [0, *store.source_ends.tolist()]
        samples = [np.arange(ends[i], ends[i + 1]) for i, _ in weighted]
        groups = _drawn(config, store, seed, held_out_by, samples)
        for (i, source), own in zip(weighted, samples, strict=True):
            try:
                parts.append(_plans_of(own, groups, config, store, seed))
            except UserError as error:
                raise UserError(f"data.sources.{i} ({source.path!r}): {error}") from None
        names, weights = zip(*((source.path, source.weight) for _, source in weighted), strict=True)
        train = mix([train for train, _ in parts], names, weights, seed)
        rests = [rest for _, rest in parts if rest is not None]
        held_out = pack.join(rests, Shuffled(sum(rest.rows for rest in rests), seed)) if rests else None
    return pack.group(train, batch_size, seed) if config.packing == "grouped" else train, held_out


def _drawn(
    config: DataConfig, store: Store, seed: int, held_out_by: HeldOutBy, parts: Sequence[np.ndarray]
) -> np.ndarray | None:
    """bool [samples of the store]: which are held out; None: each part draws among its own samples, or none is."""
    if not config.eval_fraction or held_out_by == "samples":
        return None
    groups = store.groups
    drawn = held_out_groups([groups[part] for part in parts], config.eval_fraction, partial(pack.split, seed=seed))
    return drawn[groups]


def _plans_of(
    samples: np.ndarray, drawn: np.ndarray | None, config: DataConfig, store: Store, seed: int
) -> tuple[PackPlan, PackPlan | None]:
    def plan(samples: np.ndarray) -> PackPlan:
        return pack.plan(
            store.lengths,
            seq_len=config.seq_len,
            packing=config.packing,
            seed=seed,
            splittable=store.splittable,
            first_trained=store.first_trained,
            origin=lambda i: describe_origin(*store.origin(i)),
            samples=samples,
            long_samples=config.long_samples,
        )

    if not config.eval_fraction:
        return plan(samples), None
    if drawn is None:
        train, held_out = (samples[side] for side in pack.split(len(samples), config.eval_fraction, seed))
    else:
        train, held_out = samples[~drawn[samples]], samples[drawn[samples]]
    if not len(train):
        raise UserError("each of its records is held out, as another source has the same; remove it, or that source")
    return plan(train), plan(held_out) if len(held_out) else None


class State(NamedTuple):
    """A place in the data: `position` rows of `epoch` are behind."""

    epoch: int
    position: int


START = State(0, 0)


@dataclass(frozen=True, eq=False)
class Batch(Generic[T]):
    """One step's rows.

    `arrays`: what `place` made of the host's arrays [micro-batches, rows, T] (see `PackPlan.row`), where T is the
    least of the plan's widths that holds every row of the batch, over all hosts.
    `rows`: the row of the plan at each place, int64 [micro-batches, rows]; −1 where an empty row
    stands, as the data had ended or the order leaves a place empty. `state`: where the batch after this one begins.
    """

    arrays: T
    rows: np.ndarray
    state: State


class Loader(Generic[T]):
    """Iterates over batches of `micro_batches` × `micro_batch_size` rows.

    The rows of all epochs stand in one sequence, row k being `plan.order(k // n)[k % n]` with n places in an
    epoch, and a batch is the next stretch of it; so the rest of the sequence follows from `start` alone, on any
    number of hosts. After `epochs` the last batch is completed by empty rows.

    Args:
        place: puts a batch's arrays on the devices; called on a thread, up to two batches ahead.
        start: the state to go on from, of the last batch consumed.
        epochs: None for an endless sequence.
        shuffle: False keeps the rows in the plan's order, for evaluation.
        row_slice: this host's rows of every micro-batch.
    """

    def __init__(
        self,
        store: Store,
        plan: PackPlan,
        *,
        micro_batches: int,
        micro_batch_size: int,
        place: Callable[[Arrays], T],
        start: State = START,
        epochs: int | None = None,
        shuffle: bool = True,
        row_slice: slice = slice(None),
    ) -> None:
        self._store = store
        self._plan = plan
        self._shape = (micro_batches, micro_batch_size)
        self._place = place
        self._places = len(plan.order) if shuffle else plan.rows
        self._first = start.epoch * self._places + start.position
        self._last = ENDLESS if epochs is None else epochs * self._places
        self._shuffle = shuffle
        self._row_slice = row_slice
        self._orders: dict[int, np.ndarray] = {}

    @property
    def batch_size(self) -> int:
        """Rows in a batch, over all hosts."""
        return self._shape[0] * self._shape[1]

    def __len__(self) -> int:
        """How many batches there are from the start on."""
        return max(0, -(-(self._last - self._first) // self.batch_size))

    def __iter__(self) -> Iterator[Batch[T]]:
        """The batches from the start on. Closing the iterator, or dropping it, ends its threads."""
        dataset = grain.MapDataset.range(len(self)).map(self._assemble).to_iter_dataset(READ).map(self._placed)
        ahead = iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=PLACED_AHEAD))
        try:
            yield from ahead
        finally:
            ahead.close()

    def origins(self, rows: np.ndarray) -> list[list[tuple[str, int]]]:
        """File and record of each piece in each of `rows` (of a `Batch`); none for an empty row."""
        return [self._plan.origins(self._store, row) if row >= 0 else [] for row in rows.ravel().tolist()]

    def rows_of(self, batch: int) -> np.ndarray:
        """The plan's rows in a batch, counted from the start, over all hosts; see `Batch.rows`."""
        first = self._first + batch * self.batch_size
        rows = [self._row_at(place) for place in range(first, first + self.batch_size)]
        return np.array(rows, np.int64).reshape(self._shape)

    def state_after(self, batches: int) -> State:
        """The place in the data when `batches` of them are behind, counted from the start."""
        behind = min(self._first + batches * self.batch_size, self._last)
        return State(*divmod(behind, self._places))

    def tokens_of(self, batch: int) -> int:
        """The tokens in a batch, counted from the start, over all hosts; padding is not counted."""
        rows = self.rows_of(batch)
        return int(self._plan.row_tokens[rows[rows >= 0]].sum())

    def _assemble(self, batch: int) -> tuple[Arrays, np.ndarray, State]:
        rows = self.rows_of(batch)
        width = self._plan.width_of(rows)
        rows = rows[:, self._row_slice]
        filled = [self._plan.row(self._store, row, width) for row in rows.ravel().tolist()]
        arrays = {name: np.stack([row[name] for row in filled]).reshape(*rows.shape, -1) for name in filled[0]}
        return arrays, rows, self.state_after(batch + 1)

    def _row_at(self, place: int) -> int:
        if place >= self._last:
            return -1
        epoch, position = divmod(place, self._places)
        return int(self._order(epoch)[position]) if self._shuffle else position

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = self._plan.order(epoch)
            # Several threads read: the dict is replaced, never changed, and two epochs can be wanted in turn.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return order

    def _placed(self, item: tuple[Arrays, np.ndarray, State]) -> Batch[T]:
        arrays, rows, state = item
        return Batch(self._place(arrays), rows, state)
