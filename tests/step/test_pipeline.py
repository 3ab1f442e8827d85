"""One forward, one backward: equal to one device on every mesh, in memory that does not grow with the micro-batches."""

import json
import re
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxllm.core.errors import UserError
from jaxllm.generate.__main__ import main as generate
from jaxllm.hf import load_hf
from jaxllm.models.pipeline_schedule import Schedule
from jaxllm.nn import chunks
from jaxllm.objectives.base import CROSS_ENTROPY, CrossEntropy
from jaxllm.optim.build import SophiaG
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.lora import Lora
from jaxllm.runs.config import Config
from jaxllm.runs.train_config import TrainConfig
from jaxllm.step.batch import batch_shapes
from jaxllm.step.pipeline_1f1b import pipelined
from jaxllm.step.state import abstract_state
from tests.support import whole_runs
from tests.support.families import mesh_layout, small_lm
from tests.support.small_runs import Trained, assert_trained_alike, llama, program, train
from tests.support.whole_runs import read_metrics, workplace, write_jsonl

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10

LAYERS, TIED = dict(num_hidden_layers=4), dict(num_hidden_layers=4, tie_word_embeddings=True, num_key_value_heads=2)
DORA = Lora(type="lora", r=2, use_dora=True, lora_dropout=0.2, loraplus_lr_ratio=4.0, modules_to_save=("lm_head",))


_references: dict[str, Trained] = {}


def one_device(model: dict[str, Any], how: dict[str, Any]) -> Trained:
    """The whole batch at once, without a pipeline; each such run once a session."""
    key = repr((model, how))
    if key not in _references:
        _references[key] = train(llama(**model), dtype="float64", **how)
    return _references[key]


def check(model: dict[str, Any], sizes: dict[str, int], micro_batches: int, remat: Any = "none", **how: Any) -> None:
    with jax.enable_x64(True):
        layout = mesh_layout(**sizes)
        ours = train(llama(**model), layout, micro_batches=micro_batches, remat=remat, dtype="float64", **how)
        assert_trained_alike(ours, one_device(model, how), TOLERANCE)


# The batches are ragged and packed, and the first micro-batch of eight trains nothing.
def test_data_and_tensor_parallel_stages_with_tied_heads():
    check(TIED, dict(pipeline=2, data=2, tensor=2), 8, "full")


def test_sharded_stages_with_dropout():
    check(LAYERS, dict(pipeline=4, fsdp=2), 4, dropout=0.2)


MESHES = [
    dict(pipeline=2),
    dict(pipeline=4),
    dict(pipeline=2, data=4),
    dict(pipeline=2, fsdp=4),
    dict(pipeline=2, tensor=4),
    dict(pipeline=4, data=2),
    dict(pipeline=4, tensor=2),
    dict(pipeline=2, data=2, fsdp=2),
    dict(pipeline=2, fsdp=2, tensor=2),
]


@pytest.mark.full
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh(sizes):
    """Tied and untied models, what is kept, and the number of micro-batches in turn."""
    turn = MESHES.index(sizes)
    check((TIED, LAYERS)[turn % 2], sizes, (4, 8)[turn // 2 % 2], ("none", "full")[turn // 3 % 2])


@pytest.mark.full
def test_eight_stages():
    check(dict(num_hidden_layers=8), dict(pipeline=8), 8)


SOPHIA = SophiaG(type="sophia_g", learning_rate=2e-3, hessian_every=2, schedule=Constant(type="constant", warmup=0))
KINDS = {
    "adapters": dict(method=DORA),
    "the objective and frozen leaves": dict(
        objective=CrossEntropy(label_smoothing=0.1, z_loss=1e-2), frozen=("embed/*", "*/q/kernel")
    ),
    "only the layers train": dict(frozen=("embed/*", "head/*", "norm/*")),
    "drawn targets": dict(optimizer=SOPHIA, curvature=Curvature(2, SOPHIA.rho), seed=5),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_and_what_for(kind):
    check(LAYERS, dict(pipeline=2, fsdp=2, tensor=2), 4, **KINDS[kind])


@pytest.mark.full
def test_the_loss_in_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 101 * 8 * 3)
    check(LAYERS, dict(pipeline=2, tensor=2), 4)


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    lm = small_lm(llama(**LAYERS), mesh_layout(pipeline=2, data=2), dtype="bfloat16")
    params = lm.abstract()
    state = abstract_state(params, jax.tree.map(lambda _: True, params), optax.sgd(1.0), lm.layout)
    batch = batch_shapes((4, 2, 8), lm.layout)
    _, grads = jax.eval_shape(lambda state, batch: pipelined()(lm, state, batch, CROSS_ENTROPY, None), state, batch)
    assert {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(grads)} == {
        (leaf.shape, "float32") for leaf in jax.tree.leaves(params)
    }


@pytest.mark.full
def test_what_a_bubble_computes_counts_for_nothing():
    """Without eps a norm of zeros, such as a stage has before its first micro-batch, is not finite."""
    ours = train(llama(**LAYERS, rms_norm_eps=0.0), mesh_layout(pipeline=4), micro_batches=4, steps=1)
    assert ours.metrics["bad"] == [0]
    assert np.isfinite(ours.metrics["grad_norm"])


# Memory and ticks

DEEP = dict(num_hidden_layers=8, hidden_size=64, intermediate_size=192, head_dim=8)


def compiled(micro_batches: int, **how: Any) -> Any:
    """A step with micro-batches of 16 × 32 tokens in four stages of two layers."""
    shape = (16 * micro_batches, 32)
    return program(
        llama(**DEEP), mesh_layout(pipeline=4, fsdp=2), micro_batches=micro_batches, shape=shape, **how
    ).compiled


@cache
def compiled_twice(remat: Any) -> list[Any]:
    return [compiled(micro_batches, remat=remat) for micro_batches in (5, 13)]


@pytest.mark.optimized
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.full)])
def test_memory_does_not_grow_with_the_micro_batches(remat):
    """But for the ids of the batch's tokens, which are laid out anew: no activation of all micro-batches is kept."""
    few, many = compiled_twice(remat)
    batch = many.argument_bytes - few.argument_bytes
    assert 0 <= many.temp_bytes - few.temp_bytes <= batch / 4


@pytest.mark.full
@pytest.mark.optimized
def test_less_is_kept_of_stages_than_of_layers():
    """Seven inputs of 16 × 32 tokens, over fsdp, for one layer of two."""
    layers, stages = (compiled_twice(remat)[0].temp_bytes for remat in ("none", "full"))
    ring = 7 * 16 * 32 * DEEP["hidden_size"] * 4 / 2
    assert layers - stages == pytest.approx(ring, rel=0.5)


@pytest.mark.full
@pytest.mark.optimized
def test_frozen_layers_have_no_gradients():
    lora = compiled(5, method=Lora(type="lora", r=1))
    everything = compiled_twice("none")[0]
    params = sum(leaf.size for leaf in jax.tree.leaves(small_lm(llama(**DEEP)).abstract()))
    assert everything.temp_bytes - lora.temp_bytes > 4 * params / 8


@pytest.mark.optimized
def test_the_ticks_are_those_of_the_schedule():
    """The trip counts of the compiled loops: three of ticks, and those over the two layers of a stage."""
    for micro_batches, step in zip((5, 13), compiled_twice("none"), strict=True):
        trips = [int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', step.run.as_text())]
        ticks = Schedule(stages=4, micro_batches=micro_batches)
        assert sorted(n for n in trips if n > 2) == sorted([ticks.warm_up, ticks.steady, ticks.cool_down])
        assert (ticks.warm_up, ticks.steady, ticks.cool_down) == (3, micro_batches, 3)
        # A tick of one pass and one of both take (p - 1)(F + B) together, and m(F + B) is work.
        assert ticks.bubble == 3 / (micro_batches + 3)


# Whole runs


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("pipeline"), shared) as path:
        yield path


def run(config: Any, name: str, mesh: str, *more: str) -> whole_runs.Ran:
    changes = (f"output_dir={config.parent / name}", f"mesh={mesh}", "train.micro_batch_size=1", "train.steps=4")
    return whole_runs.train(config, *changes, "train.batch_size=16", "checkpoint.every=2", *more, devices=8)


@pytest.fixture(scope="module")
def ran(config):
    return run(config, "pipelined", "{pipeline: 2, data: 2, tensor: 2}")


def test_a_run_trains_evaluates_and_exports(ran):
    assert ran.status == 0
    lines = read_metrics(ran.folder)
    first = next(line for line in lines if "train/loss" in line)
    assert first["perf/bubble"] == pytest.approx(1 / 9)  # one tick of two stages, and eight micro-batches
    assert re.search(r"2 stages and 8 micro-batches: .* each stage waits 11\.1% of the time", ran.said)
    evaluated = [line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line]
    assert evaluated[-1] < evaluated[0]
    lm, params = load_hf(ran.folder / "export/hf")
    assert np.isfinite(lm.logits(params, np.zeros((1, 4), np.int32))).all()


@pytest.mark.full
def test_one_sentence_is_learnt_by_heart(config, capsys):
    """Over pipeline, data and tensor; and what was exported says it."""
    sentence = "The three foxes of Lower Quay sold nine blue umbrellas before it began to rain."
    data = f"data.sources.0.path={write_jsonl(config.parent / 'sentence.jsonl', [{'text': sentence}] * 16)}"
    settings = (data, "data.seq_len=64", "data.packing=none", "data.eval_fraction=0", "evals=[]", "train.steps=100")
    ran = run(config, "by_heart", "{pipeline: 2, data: 2, tensor: 2}", *settings, "checkpoint.every=100")
    losses = [line["train/loss"] for line in read_metrics(ran.folder) if "train/loss" in line]
    assert losses[-1] < 0.01
    capsys.readouterr()
    assert generate([str(ran.folder), "--prompt", "The three", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == sentence


@pytest.mark.full
def test_a_run_is_that_of_another_mesh_and_goes_on_there(config, ran):
    """The same losses, in training and evaluation; from a checkpoint, on a mesh with and without a pipeline."""
    names = ("train/loss", "train/grad_norm", "eval/held_out/loss")

    def values(folder: Any, after: int = 0) -> list[float]:
        return [line[n] for line in read_metrics(folder) if line["step"] > after for n in names if n in line]

    plain = run(config, "plain", "{data: 2, fsdp: 4}")
    np.testing.assert_allclose(values(plain.folder), values(ran.folder), rtol=1e-4)
    for name, mesh, start in [("there", "{fsdp: 8}", ran), ("here", "{pipeline: 2, fsdp: 4}", plain)]:
        went_on = run(config, name, mesh, f"checkpoint.resume={start.folder / 'checkpoints/2'}")
        assert len(values(went_on.folder)) == 5
        np.testing.assert_allclose(values(went_on.folder), values(plain.folder, after=2), rtol=1e-4)


# Bad input

SIZES: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "model"},
    "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 128},
    "optim": {"type": "adalomo", "learning_rate": 1e-3},
    "mesh": {"pipeline": 2},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"remat": "dots"}}, r"mesh\.pipeline is 2, .*train\.remat or unroll is set; set remat to none"),
        ({"train": {"unroll": 2}}, r"mesh\.pipeline is 2, .*train\.remat or unroll is set; .* remove unroll"),
        (
            {"peft": {"type": "prefix_tuning", "num_virtual_tokens": 2, "prefix_projection": True}},
            r"mesh\.pipeline is 2, .*peft\.prefix_projection .*; set prefix_projection to false",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_cannot_go_together_is_refused(changes, message):
    train_config = {"steps": 10, "batch_size": 32, **changes.pop("train", {})}
    with pytest.raises((ValueError, UserError), match=message):
        Config.model_validate({**SIZES, **changes, "train": train_config})


def accumulation(**sizes: Any) -> tuple[int, int]:
    return TrainConfig(steps=1, **sizes).accumulation(mesh_layout(pipeline=4, data=2))


def test_each_stage_has_a_micro_batch():
    assert accumulation(batch_size=64) == (4, 16)
    assert accumulation(batch_size=22) == (11, 2)
    assert accumulation(batch_size=64, micro_batch_size=1) == (32, 2)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            dict(batch_size=48, micro_batch_size=8),
            ["48 is 3 micro-batches of 16", "4 stages", "micro_batch_size to 6 or train.batch_size to 64 or more"],
        ),
        (dict(batch_size=6), ["6 is 3 micro-batches of 2", "set train.batch_size to 8 or more"]),
    ],
    ids=str,
)
def test_fewer_micro_batches_than_stages_are_refused(sizes, words):
    with pytest.raises(UserError) as error:
        accumulation(**sizes)
    assert [word for word in words if word not in str(error.value)] == []
