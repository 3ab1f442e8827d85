"""Mixtures: proportions at every prefix, no record again before all were seen, and the same on any host and resume."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig
from jaxllm.data.rows.loader import DataConfig, Loader, State, plans
from jaxllm.data.rows.mixture import mix
from jaxllm.data.rows.pack import PackPlan
from jaxllm.data.rows.store import Store, open_or_build
from tests.data.rows.test_pack import PACKINGS, Samples

weights = st.floats(0.01, 1.0)


@st.composite
def mixtures(draw) -> tuple[list[PackPlan], list[float]]:
    """Up to four sources, each in rows of its own, and their weights."""
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    store = Samples([(draw(st.integers(2, 12)), 1, True) for _ in range(sum(counts))])
    ends = np.cumsum(counts)
    packing = draw(st.sampled_from(PACKINGS))
    plans = [
        store.plan(8, packing, samples=np.arange(end - count, end)) for count, end in zip(counts, ends, strict=True)
    ]
    return plans, draw(st.lists(weights, min_size=len(counts), max_size=len(counts)))


def mixed(plans: list[PackPlan], shares: list[float], seed: int = 0) -> PackPlan:
    return mix(plans, [f"s{i}" for i in range(len(plans))], shares, seed)


def source_of(plans: list[PackPlan]) -> np.ndarray:
    return np.repeat(np.arange(len(plans)), [plan.rows for plan in plans])


@given(mixtures(), st.integers(0, 3))
@settings(deadline=None)
def test_every_prefix_has_the_proportions(mixture, seed: int):
    plans, shares = mixture
    plan = mixed(plans, shares, seed)
    tokens = np.array([p.piece_size.sum() for p in plans])
    mean = tokens / [p.rows for p in plans]  # tokens of a row of each source
    wanted = np.array(shares) / sum(shares) * tokens.sum() / mean
    for epoch in range(2):
        source = source_of(plans)[plan.order(epoch)]
        counts = np.bincount(source, minlength=len(plans))
        # To the nearest row, and at least one.
        assert (np.abs(counts - wanted) <= np.where(wanted < 0.5, 1, 0.5 + 1e-9)).all()
        assert counts.sum() == len(plan.order)
        seen = np.cumsum(source[:, None] == np.arange(len(plans)), axis=0)
        planned = np.arange(1, len(source) + 1)[:, None] * counts / len(source)
        assert np.abs(seen - planned).max() <= len(plans) / 2


@given(mixtures(), st.integers(1, 4))
@settings(deadline=None)
def test_no_row_comes_again_before_all_of_its_source_were_seen(mixture, epochs: int):
    plans, shares = mixture
    plan = mixed(plans, shares)
    order = np.concatenate([plan.order(epoch) for epoch in range(epochs)])
    first = 0
    for part in plans:
        own = order[(order >= first) & (order < first + part.rows)] - first
        for start in range(0, len(own), part.rows):
            one_pass = own[start : start + part.rows].tolist()
            assert len(set(one_pass)) == len(one_pass)
        first += part.rows


def test_weights_of_the_natural_sizes_are_every_row_once():
    store = Samples([(n % 7 + 2, 1, True) for n in range(50)])
    plans = [store.plan(8, "best_fit", samples=np.arange(a, b)) for a, b in ((0, 5), (5, 20), (20, 50))]
    plan = mixed(plans, [float(p.piece_size.sum()) for p in plans])
    assert len(plan.order) == plan.rows
    assert sorted(plan.order(0).tolist()) == list(range(plan.rows))
    assert plan.order(0).tolist() != plan.order(1).tolist()
    assert plan.order(0).tolist() != mixed(plans, [float(p.piece_size.sum()) for p in plans], 1).order(0).tolist()


@given(mixtures())
@settings(deadline=None)
def test_the_rows_are_those_of_the_parts(mixture):
    plans, shares = mixture
    plan = mixed(plans, shares)
    joined = [(plan.piece_sample[j], plan.piece_start[j]) for i in range(plan.rows) for j in plan.pieces_of(i)]
    apart = [(p.piece_sample[j], p.piece_start[j]) for p in plans for i in range(p.rows) for j in p.pieces_of(i)]
    assert joined == apart
    assert plan.row_tokens.tolist() == [n for p in plans for n in p.row_tokens.tolist()]


# Sources in files


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    paths = []
    for name, count in (("large", 60), ("middle", 25), ("small", 7)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": name[0] * (3 * i % 17 + 1)}) + "\n" for i in range(count)))
        paths.append(path)
    return tuple(paths)


def data(paths, shares, **options) -> DataConfig:
    sources = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, shares, strict=True)]
    return DataConfig(sources=sources, **({"seq_len": 20} | options))


@pytest.fixture(scope="module")
def store(sources, byte_tokenizer, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("cache")
    built = open_or_build(data(sources, [1, 1, 1]).sources, byte_tokenizer, cache=folder, progress=False)
    again = open_or_build(data(sources, [5, 0, 1]).sources, byte_tokenizer, cache=folder, progress=False)
    assert built.folder == again.folder  # weights do not change what is tokenized
    return built


def seen_records(store: Store, plan: PackPlan, hosts: int, start: State, batches: int, size: int = 12) -> Counter:
    """The records in `batches` batches from `start`, over hosts that each take their rows."""
    each = size // hosts
    seen: Counter = Counter()
    for host in range(hosts):
        rows = slice(each * host, each * (host + 1))
        loader = Loader(
            store, plan, micro_batches=1, micro_batch_size=size, place=lambda a: a, start=start, row_slice=rows
        )
        for batch in itertools.islice(loader, batches):
            seen.update(origin for row in loader.origins(batch.rows) for origin in row)
    return seen


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shares", [(None, None, None), (0.2, 0.3, 0.5)])
def test_any_number_of_hosts_sees_the_same_records_also_after_a_resume(sources, store, packing, shares):
    plan, _ = plans(data(sources, shares, packing=packing), store, seed=3, batch_size=12)
    batches = 3 * -(-len(plan.order) // 12)
    alone = seen_records(store, plan, 1, State(0, 0), batches)
    whole = Loader(store, plan, micro_batches=1, micro_batch_size=12, place=lambda a: a)
    for hosts in (2, 3, 4):
        assert seen_records(store, plan, hosts, State(0, 0), batches) == alone
        # Stopped twice, the second time in the third epoch, and gone on with other numbers of hosts.
        stops = (0, batches // 4, 3 * batches // 4, batches)
        parts = [
            seen_records(store, plan, part_hosts, whole.state_after(a), b - a)
            for (a, b), part_hosts in zip(itertools.pairwise(stops), (hosts, 1, hosts), strict=True)
        ]
        assert sum(parts, Counter()) == alone


@pytest.mark.parametrize("packing", PACKINGS)
@given(position=st.integers(0, 40), shares=st.sampled_from([(None, None, None), (0.2, 0.3, 0.5), (3, 0, 1)]))
@settings(max_examples=15, deadline=None)
def test_a_resume_at_any_batch_has_the_same_rows_left(sources, store, packing, position, shares):
    plan, _ = plans(data(sources, shares, packing=packing), store, seed=1, batch_size=4)
    whole = Loader(store, plan, micro_batches=2, micro_batch_size=2, place=lambda a: a, epochs=3)
    assume(position <= len(whole))
    rest = Loader(
        store, plan, micro_batches=2, micro_batch_size=2, place=lambda a: a, epochs=3, start=whole.state_after(position)
    )
    assert len(rest) == len(whole) - position
    for batch in range(len(rest)):
        assert (rest.rows_of(batch) == whole.rows_of(position + batch)).all()
        assert rest.state_after(batch) == whole.state_after(position + batch)


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_come_in_proportion_to_the_weights(sources, store, packing):
    shares = (0.1, 0.3, 0.6)
    plan, _ = plans(data(sources, shares, packing=packing), store, seed=0, batch_size=8)
    loader = Loader(store, plan, micro_batches=1, micro_batch_size=8, place=lambda a: a, epochs=6)
    tokens: Counter = Counter()
    for batch in loader:
        for i, row in enumerate(batch.rows.ravel().tolist()):
            if row >= 0:
                (path,) = {path for path, _ in loader.origins(np.array([row]))[0]}  # a row is of one source
                tokens[path] += int((batch.arrays["segments"][0, i] > 0).sum())
    whole = sum(tokens.values())
    # To a row of 20 tokens each way in an epoch of about 700.
    for path, share in zip(sources, shares, strict=True):
        assert tokens[str(path)] / whole == pytest.approx(share, abs=0.04)
        planned = re.search(rf"([0-9.]+)% of the tokens from {path}, seen", str(plan))
        assert planned is not None
        assert float(planned[1]) / 100 == pytest.approx(tokens[str(path)] / whole, abs=0.01)
    assert whole / 6 == pytest.approx((store.lengths - 1).sum(), rel=0.08)


def test_each_source_holds_out_its_share(sources, store):
    train, held_out = plans(data(sources, (1, 1, 1), eval_fraction=0.2), store, seed=0, batch_size=4)
    assert held_out is not None
    assert not set(train.piece_sample) & set(held_out.piece_sample)
    assert not set(store.content[train.piece_sample]) & set(store.content[held_out.piece_sample])
    for plan, counts in ((train, (14, 14, 6)), (held_out, (3, 3, 1))):  # of 17, 17 and 7 texts, which are repeated
        texts = {(store.origin(int(i))[0], int(store.content[i])) for i in plan.piece_sample}
        files = [file for file, _ in texts]
        assert Counter(files) == {str(path): count for path, count in zip(sources, counts, strict=True)}


def test_a_source_of_weight_0_is_left_out(sources, store):
    for plan in plans(data(sources, (1, 0, 2), eval_fraction=0.2), store, seed=0, batch_size=4):
        assert plan is not None
        assert {store.origin(int(i))[0] for i in plan.piece_sample} == {str(sources[0]), str(sources[2])}


def test_one_source_with_a_weight_is_that_source(sources, store):
    plan, _ = plans(data(sources, (0, 0.25, 0)), store, seed=0, batch_size=4)
    assert len(plan.order) == plan.rows
    assert set(plan.piece_sample.tolist()) == set(range(60, 85))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((1, None, 1), r"sources.1 has no weight and sources.0 has one; give a weight to all .* or to none"),
        ((0, 0, 0), "every source has weight 0"),
        ((1, -1, 1), "weight\n.*greater than or equal to 0"),
        ((1, float("nan"), 1), "weight\n.*finite"),
    ],
)
def test_wrong_weights(sources, shares, message):
    with pytest.raises(ValidationError, match=message):
        data(sources, shares)


@pytest.mark.parametrize("shares", [(None, None), (1, 2)])
def test_a_source_that_is_there_twice(sources, shares):
    with pytest.raises(ValidationError, match=r"sources.0 and sources.1 are the same .*large.* give every source"):
        data((sources[0], sources[0]), shares)


def test_a_source_that_trains_nothing_is_named(tmp_path: Path, byte_tokenizer):
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    config = data([tmp_path / "good.jsonl", tmp_path / "bad.jsonl"], (1, 1))
    with pytest.raises(UserError, match=r"nothing is trained in '.*bad.jsonl'"):
        open_or_build(config.sources, byte_tokenizer, cache=tmp_path, progress=False)


def test_mixing_a_million_samples_takes_little_time():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).astype(np.int64), 2, 20_000)
    everywhere = np.ones(len(lengths), np.int64)
    store = Samples([])
    store.lengths, store.splittable, store.first_trained = lengths, everywhere > 0, everywhere
    parts = [store.plan(2048, "none", samples=np.arange(a, b)) for a, b in ((0, 900_000), (900_000, 1_000_000))]
    plan = mixed(parts, [1, 1])
    order = plan.order(7)
    share = plan.row_tokens[order[order < parts[0].rows]].sum() / plan.row_tokens[order].sum()
    assert share == pytest.approx(0.5, abs=0.001)
