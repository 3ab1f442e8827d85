"""From records to the loss: packing, padding and batches of like length mean the same, and documents keep apart."""

import itertools

import jax
import numpy as np
import pytest

from jaxllm.data.rows.loader import Loader
from jaxllm.data.rows.pack import group
from tests.support.documents import Documents
from tests.support.families import draw_params, small_lm
from tests.support.small_runs import llama
from tests.support.whole_runs import read_metrics, stories, train, workplace, write_jsonl

# Two programs in float64 that mean the same (the sums of a batch have a few hundred terms).
SAME = 1e-12


@pytest.fixture
def model():
    """A small Llama in float64: its loss and its logits as functions of rows."""
    with jax.enable_x64(True):
        lm = small_lm(llama(), dtype="float64")
        params = draw_params(lm)
        loss = jax.jit(lambda rows: lm.losses(params, rows).cross_entropy)
        logits = jax.jit(
            lambda rows: lm.logits(params, rows["tokens"], positions=rows["positions"], segments=rows["segments"])
        )
        yield loss, logits


def test_packed_documents_have_the_loss_of_one_a_row(model):
    loss, _ = model
    documents = Documents()
    alone, packed = documents.rows("none"), documents.rows("best_fit")
    assert len(packed["tokens"]) < 0.7 * len(alone["tokens"])
    assert packed["loss_mask"].sum() == alone["loss_mask"].sum()
    assert float(loss(packed)) == pytest.approx(float(loss(alone)), rel=SAME)
    # The packed rows without their segments: each document but the first of a row would see another.
    leaking = {**packed, "segments": (packed["segments"] > 0).astype(np.int32)}
    assert float(loss(leaking)) != pytest.approx(float(loss(alone)), rel=1e-3)


@pytest.mark.optimized
def test_no_document_of_a_packed_row_moves_the_logits_of_another(model):
    _, logits = model
    packed = Documents().rows("best_fit")
    row = int(np.argmax(packed["segments"].max(axis=1)))
    rows = {name: array[row : row + 1] for name, array in packed.items()}
    segments = rows["segments"][0]
    assert segments.max() >= 3
    before = np.asarray(logits(rows))[0]
    for document in range(1, segments.max() + 1):
        tokens = np.where(segments == document, (rows["tokens"] + 1) % 101, rows["tokens"]).astype(np.int32)
        after = np.asarray(logits({**rows, "tokens": tokens}))[0]
        moved = (before.view("u8") != after.view("u8")).any(axis=-1)
        assert not moved[segments != document].any()
        assert moved[segments == document].all()


def test_a_batch_of_like_length_has_the_loss_of_the_same_rows_padded(model):
    loss, _ = model
    documents = Documents()
    grouped = group(documents.plan("grouped"), 4, seed=0)
    assert grouped.widths == (2, 8, 16)
    loader = Loader(documents, grouped, micro_batches=1, micro_batch_size=4, place=lambda a: a, epochs=1)
    total, widths = 0.0, set()
    for batch in loader:
        rows = {name: array[0] for name, array in batch.arrays.items()}
        widths.add(rows["tokens"].shape[1])
        full = [grouped.row(documents, row) for row in batch.rows[0].tolist()]
        padded = {name: np.stack([row[name] for row in full]) for name in rows}
        assert float(loss(rows)) == pytest.approx(float(loss(padded)), rel=SAME)
        total += float(loss(rows))
    assert widths == {2, 8, 16}
    assert total == pytest.approx(float(loss(documents.rows("none"))), rel=SAME)


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as path:
        yield path


def test_a_run_on_a_mixture_in_batches_of_like_length(config, shared):
    folder = config.parent
    short = write_jsonl(folder / "short.jsonl", [{"text": r["text"][:120]} for r in stories(shared, 40, first=20)])
    sources = f"[{{path: {folder / 'stories.jsonl'}, weight: 0.6}}, {{path: {short}, weight: 0.4}}]"
    data = f"data={{sources: {sources}, seq_len: 128, packing: grouped, eval_fraction: 0.2}}"
    ran = train(config, data, "train.steps=8", "checkpoint.every=3")
    assert ran.status == 0
    assert "rows of 64 or 128 tokens" in ran.said
    assert f"% of the tokens from {short}, seen " in ran.said
    whole = read_metrics(ran.folder)
    # Each step's tokens are of that step's rows: several times none but short ones.
    steps = [0, *(line["train/tokens"] for line in whole if "train/tokens" in line)]
    tokens = [after - before for before, after in itertools.pairwise(steps)]
    assert min(tokens) < 8 * 64 < max(tokens)
    # Stopped after step 6 and gone on, the last two steps are the same.
    for step in ("8", "latest"):
        path = ran.folder / "checkpoints" / step
        path.rename(folder / step)
    (ran.folder / "checkpoints/latest").write_text("6\n")
    again = train(config, data, "train.steps=8", "checkpoint.every=3")
    assert "2 of 8 steps to go" in again.said
    names = ("step", "train/loss", "train/tokens")
    ours, theirs = (
        [[line[name] for name in names] for line in lines if "train/loss" in line] for lines in (again.metrics(), whole)
    )
    assert ours == theirs
