"""Batches are the rows of the plan in the order of the epochs, from any place on, on any number of hosts."""

import itertools
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig
from jaxllm.data.rows.loader import DataConfig, Loader, State, plans
from jaxllm.data.rows.pack import PackPlan
from jaxllm.data.rows.store import Store, open_or_build


@pytest.fixture(scope="module")
def store(byte_tokenizer, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("loader")
    path = folder / "a.jsonl"
    path.write_text("".join(f'{{"text": "{"x" * (7 * i % 23 + 1)}"}}\n' for i in range(60)))
    return open_or_build([SourceConfig(path=str(path))], byte_tokenizer, cache=folder, progress=False)


def config(store: Store, **options) -> DataConfig:
    sources = [SourceConfig(path=store.origin(0)[0])]
    return DataConfig(sources=sources, **({"seq_len": 32} | options))


@pytest.fixture(scope="module")
def plan(store: Store) -> PackPlan:
    return plans(config(store), store, seed=1, batch_size=6)[0]


def loader(store: Store, plan: PackPlan, micro_batches: int = 2, micro_batch_size: int = 3, **options) -> Loader:
    return Loader(
        store,
        plan,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        **({"place": lambda arrays: arrays} | options),
    )


def take(count: int, loader: Loader) -> list:
    return list(itertools.islice(loader, count))


def rows_of(batches: list) -> list[int]:
    return [row for batch in batches for row in batch.rows.ravel().tolist()]


def test_a_batch_is_made_of_the_rows_of_the_plan(store: Store, plan: PackPlan):
    (batch,) = take(1, loader(store, plan))
    assert batch.rows.tolist() == plan.order(0)[:6].reshape(2, 3).tolist()
    kinds = {name: (array.shape, array.dtype.name) for name, array in batch.arrays.items()}
    integers = ("tokens", "targets", "positions", "segments")
    assert kinds == dict.fromkeys(integers, ((2, 3, 32), "int32")) | {"loss_mask": ((2, 3, 32), "float32")}
    for a, m in np.ndindex(2, 3):
        for name, array in plan.row(store, int(batch.rows[a, m])).items():
            assert (batch.arrays[name][a, m] == array).all()


def test_epochs_follow_each_other_without_a_gap(store: Store, plan: PackPlan):
    assert plan.rows % 6  # a batch holds rows of two epochs
    expected = np.concatenate([plan.order(epoch) for epoch in range(3)]).tolist()
    batches = take(len(expected) // 6, loader(store, plan))
    assert rows_of(batches) == expected[: 6 * len(batches)]


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_last_batch_is_completed_by_empty_rows(store: Store, plan: PackPlan, epochs: int):
    wanted = loader(store, plan, epochs=epochs)
    batches = list(wanted)
    assert len(batches) == len(wanted) == -(-epochs * plan.rows // 6)
    counts = Counter(rows_of(batches))
    empty = counts.pop(-1)
    assert empty == -epochs * plan.rows % 6
    assert counts == dict.fromkeys(range(plan.rows), epochs)
    last = batches[-1]
    assert not any(array[last.rows < 0].any() for array in last.arrays.values())
    assert last.state == State(epochs, 0)
    trained = sum(int(batch.arrays["loss_mask"].sum()) for batch in batches)
    assert trained == epochs * store.summary.trained_tokens


@given(st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_it_goes_on_from_any_state(store: Store, plan: PackPlan, before: int, after: int):
    whole = take(before + after, loader(store, plan))
    rest = take(after, loader(store, plan, start=whole[before - 1].state))
    for expected, batch in zip(whole[before:], rest, strict=True):
        assert (expected.rows == batch.rows).all()
        assert expected.state == batch.state
        assert all((expected.arrays[name] == batch.arrays[name]).all() for name in expected.arrays)


def test_another_batch_size_goes_on_in_the_same_sequence(store: Store, plan: PackPlan):
    first = take(3, loader(store, plan))
    rest = take(5, loader(store, plan, 1, 4, start=first[-1].state))
    sequence = np.concatenate([plan.order(epoch) for epoch in range(3)]).tolist()
    assert rows_of(first) + rows_of(rest) == sequence[: 3 * 6 + 5 * 4]


def test_after_the_end_there_is_nothing(store: Store, plan: PackPlan):
    finished = loader(store, plan, epochs=1, start=State(1, 0))
    assert len(finished) == 0
    assert list(finished) == []


@pytest.mark.parametrize(("packing", "micro_batches"), [("best_fit", 2), ("grouped", 1)])
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_take_their_rows_of_each_micro_batch(store: Store, hosts: int, packing: str, micro_batches: int):
    plan, _ = plans(config(store, packing=packing), store, seed=1, batch_size=6 * micro_batches)
    alone = list(loader(store, plan, micro_batches, 6, epochs=2))
    each = 6 // hosts
    parts = [
        list(loader(store, plan, micro_batches, 6, epochs=2, row_slice=slice(each * host, each * (host + 1))))
        for host in range(hosts)
    ]
    for step, whole in enumerate(alone):
        together = [part[step] for part in parts]
        assert (np.concatenate([batch.rows for batch in together], axis=1) == whole.rows).all()
        assert {batch.state for batch in together} == {whole.state}
        for name, array in whole.arrays.items():
            assert (np.concatenate([batch.arrays[name] for batch in together], axis=1) == array).all()


def test_grouped_batches_are_as_wide_as_their_longest_row_needs(store: Store):
    plan, _ = plans(config(store, packing="grouped"), store, seed=1, batch_size=6)
    assert plan.widths == (4, 8, 16, 32)
    batches = list(loader(store, plan, epochs=2))
    for batch in batches:
        longest = max(plan.row_tokens[row] for row in batch.rows.ravel() if row >= 0)
        width = next(width for width in plan.widths if width >= longest)
        assert {array.shape for array in batch.arrays.values()} == {(2, 3, width)}
    assert {batch.arrays["tokens"].shape[-1] for batch in batches} == {4, 8, 16, 32}
    places = sum(batch.arrays["tokens"].size for batch in batches)
    assert places < 0.75 * 2 * plan.rows * 32
    # Evaluation goes through the same rows from the shortest to the longest.
    lengths = [plan.row_tokens[row] for row in rows_of(list(loader(store, plan, epochs=1, shuffle=False))) if row >= 0]
    assert lengths == sorted(lengths)
    assert len(lengths) == plan.rows


def test_evaluation_takes_the_rows_in_order(store: Store, plan: PackPlan):
    rows = rows_of(list(loader(store, plan, epochs=1, shuffle=False)))
    assert rows == [*range(plan.rows), *[-1] * (-plan.rows % 6)]


def test_a_batch_is_told_without_reading_it(store: Store, plan: PackPlan):
    ending = loader(store, plan, epochs=2, start=State(0, 4), row_slice=slice(0, 1))
    whole = list(loader(store, plan, epochs=2, start=State(0, 4)))
    for i, batch in enumerate(whole):
        assert (ending.rows_of(i) == batch.rows).all()
        assert ending.tokens_of(i) == int((batch.arrays["segments"] > 0).sum())
        assert ending.state_after(i + 1) == batch.state
    assert ending.state_after(0) == State(0, 4)


def test_rows_name_their_origins(store: Store, plan: PackPlan):
    wanted = loader(store, plan, epochs=1)
    origins = [pieces for batch in wanted for pieces in wanted.origins(batch.rows)]
    path = store.origin(0)[0]
    # No text is longer than the window, so each record is one piece.
    assert Counter(itertools.chain(*origins)) == {(path, line): 1 for line in range(1, 61)}
    assert origins[-1] == []


def test_batches_are_placed_two_ahead_on_a_thread(store: Store, plan: PackPlan):
    placed: list[str] = []

    def place(arrays):
        placed.append(threading.current_thread().name)
        return len(placed)

    with closing(iter(loader(store, plan, place=place))) as batches:
        assert next(batches).arrays == 1
        deadline = time.monotonic() + 10
        # Two wait in the queue and the thread holds one more.
        while len(placed) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(placed) == 4
        assert len({*placed} - {threading.current_thread().name}) == 1


def test_what_fails_in_placing_is_raised_after_the_batches_before_it(store: Store, plan: PackPlan):
    calls = itertools.count(1)

    def place(arrays):
        if next(calls) > 12:
            raise RuntimeError("the device is gone")
        return arrays

    seen = iter(loader(store, plan, place=place))
    assert len(list(itertools.islice(seen, 12))) == 12
    with pytest.raises(RuntimeError, match="the device is gone"):
        next(seen)


def test_what_fails_in_reading_is_raised(store: Store, plan: PackPlan, monkeypatch):
    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Store, "sample", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(loader(store, plan)))


def test_closing_ends_the_threads_at_once(store: Store, plan: PackPlan):
    before = set(threading.enumerate())
    for consumed in (0, 1, 5):
        batches = iter(loader(store, plan))
        for _ in range(consumed):
            next(batches)
        start = time.monotonic()
        batches.close()
        # Generous, as the machine may be busy; a thread that hangs would take the 10 s of `close`.
        assert time.monotonic() - start < 5
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_held_out_samples_are_not_trained(store: Store):
    train, held_out = plans(config(store, eval_fraction=0.25), store, seed=3, batch_size=6)
    assert held_out is not None
    assert len(set(train.piece_sample) | set(held_out.piece_sample)) == 60
    contents = [set(store.content[plan.piece_sample].tolist()) for plan in (train, held_out)]
    assert list(map(len, contents)) == [17, 6]  # of 23 texts, which are repeated
    assert not contents[0] & contents[1]
    assert plans(config(store), store, seed=3, batch_size=6)[1] is None


def test_bad_settings(store: Store, tmp_path: Path, byte_tokenizer):
    for wrong in ({"seq_len": 0}, {"packing": "first_fit"}, {"eval_fraction": 1.0}, {"eval_fraction": -0.1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            config(store, **wrong)
    with pytest.raises(ValidationError, match="sources"):
        DataConfig(sources=[], seq_len=4)
    (tmp_path / "a.txt").write_text("one document")
    single = DataConfig(sources=[SourceConfig(path=str(tmp_path / "a.txt"))], seq_len=4, eval_fraction=0.1)
    built = open_or_build(single.sources, byte_tokenizer, cache=tmp_path, progress=False)
    with pytest.raises(UserError, match="separator"):
        plans(single, built, seed=0, batch_size=6)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none", "grouped"])
def test_real_text_is_trained_once_an_epoch(shared: Path, tmp_path: Path, packing: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories3M")
    data = DataConfig(
        sources=[SourceConfig(path=str(shared / "data/alpaca_gpt4/alpaca_en_demo.json"))], seq_len=256, packing=packing
    )
    built = open_or_build(data.sources, tokenizer, cache=tmp_path, progress=False)
    packed, _ = plans(data, built, seed=0, batch_size=6)
    lost = 0
    if packing != "concat":  # answers behind the window are cut off
        lost = sum(int(built.sample(int(i)).trained[257:].sum()) for i in np.flatnonzero(built.lengths > 257))
    counted = sum(batch.arrays["loss_mask"].sum() for batch in loader(built, packed, 1, 64, epochs=1))
    assert counted == built.summary.trained_tokens - lost
    assert packed.cut + packed.dropped == (0 if packing == "concat" else (built.lengths > 257).sum())
