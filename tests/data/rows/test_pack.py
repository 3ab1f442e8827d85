"""Every trained target stands in exactly one place, rows are full and legal, and orders follow from the seed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import UserError
from jaxllm.data.rows.best_fit import best_fit
from jaxllm.data.rows.pack import PackPlan, plan, split
from jaxllm.data.text.tokenize import Sample

PACKINGS = ["best_fit", "concat", "none", "grouped"]


class Samples:
    """A store of synthetic samples: token j of sample i is 1000·(i + 1) + j; targets from `first` on are trained."""

    def __init__(self, specs: list[tuple[int, int, bool]]) -> None:
        self.lengths = np.array([length for length, _, _ in specs], np.int64)
        self.first_trained = np.array([first for _, first, _ in specs], np.int64)
        self.splittable = np.array([can for _, _, can in specs], bool)

    def sample(self, i: int, start: int, stop: int) -> Sample:
        places = np.arange(self.lengths[i])
        ids = (1000 * (i + 1) + places).astype(np.int32)
        return Sample(ids[start:stop], (places >= self.first_trained[i])[start:stop])

    def origin(self, i: int) -> tuple[str, int]:
        return "file", i

    def plan(self, seq_len: int, packing: str, seed: int = 0, **options) -> PackPlan:
        return plan(
            self.lengths,
            seq_len=seq_len,
            packing=packing,
            seed=seed,
            splittable=self.splittable,
            first_trained=self.first_trained,
            origin=lambda i: f"file, record {i}",
            **options,
        )


@st.composite
def stores(draw) -> Samples:
    def spec(length: int) -> tuple[int, int, bool]:
        splittable = draw(st.booleans())
        return length, 1 if splittable else draw(st.integers(1, length - 1)), splittable

    return Samples([spec(n) for n in draw(st.lists(st.integers(2, 40), min_size=1, max_size=20))])


@given(
    stores(),
    st.integers(1, 17),
    st.sampled_from(PACKINGS),
    st.integers(0, 3),
    st.sampled_from(["auto", "split", "cut", "drop"]),
)
@settings(max_examples=500, deadline=None)
def test_every_trained_target_stands_in_exactly_one_place(
    store: Samples, seq_len: int, packing: str, seed: int, long_samples: str
):
    long = store.lengths - 1 > seq_len
    cut_at = np.full(len(store.lengths), 10**9)
    if long_samples == "cut":
        cut_at[:] = seq_len
    if long_samples == "auto" and packing != "concat":
        cut_at[~store.splittable] = seq_len
    left_out = long & (long_samples == "drop")
    assume(((store.first_trained <= cut_at) & ~left_out).any())
    packed = store.plan(seq_len, packing, seed, long_samples=long_samples)
    seen: Counter[int] = Counter()
    trained: Counter[int] = Counter()
    for i in range(packed.rows):
        row = packed.row(store, i)
        assert all(array.shape == (seq_len,) for array in row.values())
        real = row["segments"] > 0
        # A token is followed by its own target, within one sample.
        assert (row["targets"][real] == row["tokens"][real] + 1).all()
        # Places behind the last piece are empty, and there are none between pieces.
        assert not any(array[~real].any() for array in row.values())
        assert real[: real.sum()].all()
        assert real.any()
        pieces = packed.pieces_of(i)
        assert sorted(set(row["segments"][real].tolist())) == list(range(1, len(pieces) + 1))
        for segment in range(1, len(pieces) + 1):
            inside = row["segments"] == segment
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            tokens = row["tokens"][inside]
            assert (np.diff(tokens) == 1).all()
            assert len(set((tokens // 1000).tolist())) == 1
        seen.update(row["targets"][real].tolist())
        trained.update(row["targets"][row["loss_mask"] == 1].tolist())
        assert set(row["loss_mask"].tolist()) <= {0.0, 1.0}
    reached = store.first_trained <= cut_at
    kept = reached & ~left_out
    ids = [
        (1000 * (i + 1) + j, j >= store.first_trained[i])
        for i in np.flatnonzero(kept)
        for j in range(1, int(min(store.lengths[i], cut_at[i] + 1)))
    ]
    assert seen == Counter(token for token, _ in ids)
    assert trained == Counter(token for token, is_trained in ids if is_trained)
    assert packed.samples == kept.sum()
    assert packed.dropped == (~reached).sum()
    assert packed.too_long == left_out.sum()
    assert packed.cut == (kept & (store.lengths - 1 > cut_at)).sum()
    assert packed.split == (kept & long & (cut_at > seq_len)).sum()
    lost = np.flatnonzero(left_out | (store.lengths - 1 > cut_at))
    assert packed.first_long == (f"file, record {lost[0]}" if len(lost) else "")
    padded = sum(packed.width_of(np.array([i])) for i in range(packed.rows))
    assert packed.efficiency == pytest.approx(sum(seen.values()) / padded)
    assert padded == packed.rows * seq_len or packing == "grouped"


@given(stores(), st.integers(1, 17), st.sampled_from(PACKINGS), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_plan_follows_from_its_arguments(store: Samples, seq_len: int, packing: str, seed: int):
    assume((store.first_trained <= seq_len).any())
    one, two = (store.plan(seq_len, packing, seed) for _ in range(2))
    for name in ("piece_sample", "piece_start", "piece_size", "row_ends"):
        assert (getattr(one, name) == getattr(two, name)).all()
    for epoch in range(3):
        assert (one.order(epoch) == two.order(epoch)).all()
        assert sorted(one.order(epoch).tolist()) == list(range(one.rows))


def test_orders_differ_by_epoch_and_seed_and_never_change():
    store = Samples([(2, 1, True)] * 8)
    plans = [store.plan(1, "none", seed) for seed in (0, 1)]
    orders = [tuple(p.order(epoch).tolist()) for p in plans for epoch in (0, 1)]
    assert len(set(orders)) == 4
    # A run that is resumed with another version of numpy must go on in the same order.
    assert orders[0] == (4, 3, 7, 6, 5, 2, 0, 1)


def textbook_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, as a book writes it."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b in bins if sum(b) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@given(
    st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=60)))
)
@settings(max_examples=300, deadline=None)
def test_best_fit_is_the_textbooks(case: tuple[int, list[int]]):
    capacity, sizes = case
    assigned = best_fit(np.array(sizes), capacity)
    # Of bins with equal room either may be chosen, so the fills are the same and not the contents.
    fills = np.bincount(assigned, weights=sizes).astype(int).tolist()
    assert sorted(fills) == sorted(sum(b) for b in textbook_best_fit(sizes, capacity))


def test_none_gives_each_sample_a_row_of_its_own():
    store = Samples([(3, 1, False), (5, 1, True), (2, 1, False)])
    packed = store.plan(3, "none")
    assert (packed.rows, packed.pieces, packed.samples) == (4, 4, 3)


def test_concat_fills_every_row_but_the_last():
    store = Samples([(n, 1, False) for n in (5, 9, 2, 7)])
    packed = store.plan(4, "concat")
    full = [int((packed.row(store, i)["segments"] > 0).sum()) for i in range(packed.rows)]
    assert full == [4, 4, 4, 4, 3]


def test_concat_mixes_the_samples():
    store = Samples([(3, 1, True)] * 50)
    assert store.plan(8, "concat").piece_sample.tolist() != sorted(store.plan(8, "concat").piece_sample.tolist())


def test_some_samples_alone_and_their_origins():
    store = Samples([(3, 1, True)] * 6)
    packed = store.plan(4, "best_fit", samples=np.array([1, 4, 5]))
    assert sorted(packed.piece_sample.tolist()) == [1, 4, 5]
    origins = [origin for i in range(packed.rows) for origin in packed.origins(store, i)]
    assert sorted(origins) == [("file", 1), ("file", 4), ("file", 5)]


def test_a_long_sample_can_be_an_error_that_names_the_first():
    store = Samples([(5, 1, True), (6, 1, True), (9, 1, False), (7, 1, True)])
    with pytest.raises(UserError, match=r"^file, record 1 has 6 tokens, .* = 4 holds 5; 3 of 4 samples are too long\."):
        store.plan(4, "best_fit", long_samples="error")
    assert store.plan(8, "best_fit", long_samples="error").samples == 4
    with pytest.raises(UserError, match=r"none of 1 samples .* is no longer than that"):
        store.plan(4, "best_fit", samples=np.array([2]), long_samples="drop")


def test_the_summary_tells_of_long_samples():
    store = Samples([(4, 1, True), (9, 1, True), (9, 1, False), (9, 7, False), (7, 1, False)])
    said = str(store.plan(4, "best_fit"))
    assert "1 samples longer than the window, and split; 2 samples cut at the end of the window" in said
    assert "1 samples dropped: nothing trained in the window (the first: file, record 2)" in said
    assert "4 samples left out: longer than the window (the first: file, record 1)" in str(
        store.plan(4, "none", long_samples="drop")
    )


def test_rows_of_like_length_are_padded_to_few_widths():
    store = Samples([(n, 1, True) for n in (2, 3, 5, 6, 9, 10, 17, 18, 33)])
    packed = store.plan(32, "grouped")
    assert packed.widths == (4, 8, 16, 32)
    assert [packed.width_of(np.array([i])) for i in range(packed.rows)] == [4] * 3 + [8] * 2 + [16] * 2 + [32] * 2
    assert packed.width_of(np.array([0, -1, 3])) == 8
    assert packed.width_of(np.array([-1])) == 4
    short = packed.row(store, 0, 4)
    for name, array in packed.row(store, 0).items():
        assert (array[:4] == short[name]).all()
        assert not array[4:].any()
    # Widths that no row needs, and those that do not divide, are none.
    assert store.plan(36, "grouped", samples=np.array([0, 8])).widths == (9, 36)
    assert store.plan(7, "grouped").widths == (7,)


def test_nothing_within_the_window():
    with pytest.raises(UserError, match=r"none of 1 samples has a trained token within data.seq_len = 4"):
        Samples([(10, 5, False)]).plan(4, "best_fit")


@given(st.integers(2, 200), st.floats(0.001, 0.5), st.integers(0, 3))
@settings(deadline=None)
def test_a_split_is_a_partition(n: int, fraction: float, seed: int):
    train, held_out = split(n, fraction, seed)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(n))
    assert len(train) >= 1
    assert len(held_out) == max(1, round(n * fraction))
    assert (split(n, fraction, seed)[1] == held_out).all()


def test_a_split_that_leaves_nothing():
    with pytest.raises(UserError, match=r"eval_fraction = 0.1 of 1 different records leaves none to train on"):
        split(1, 0.1, 0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_million_samples(packing: str):
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).astype(np.int64), 2, 20_000)
    everywhere = np.ones(len(lengths), np.int64)
    packed = plan(
        lengths,
        seq_len=2048,
        packing=packing,
        seed=0,
        splittable=everywhere > 0,
        first_trained=everywhere,
        origin=str,
    )
    assert packed.piece_size.sum() == (lengths - 1).sum()
    assert np.diff(np.append(0, np.cumsum(packed.piece_size))[np.append(0, packed.row_ends)]).max() <= 2048
    assert packed.efficiency > {"none": 0.1, "grouped": 0.6}.get(packing, 0.99)
