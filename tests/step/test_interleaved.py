"""Stages with several chunks of layers: equal to one device, in memory that does not grow, with shorter bubbles."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.checkpoint.store import checkpoints
from jaxllm.convert.__main__ import main as convert
from jaxllm.core.errors import UserError
from jaxllm.core.layer_order import rearranged
from jaxllm.hf import load_hf
from jaxllm.models.gpipe import of_pass
from jaxllm.models.pipeline_schedule import Schedule
from jaxllm.optim.build import Lomo
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.adalora import AdaLora
from jaxllm.peft.lora import Lora
from jaxllm.runs.config import Config
from tests.support import whole_runs
from tests.support.families import mesh_layout
from tests.support.small_runs import Trained, assert_trained_alike, llama, program, ragged_batch, train
from tests.support.whole_runs import read_metrics, workplace

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10

LAYERS, TIED = dict(num_hidden_layers=4), dict(num_hidden_layers=4, tie_word_embeddings=True, num_key_value_heads=2)
DORA = Lora(type="lora", r=2, use_dora=True, lora_dropout=0.2, layers_to_transform=(0, 1), modules_to_save=("lm_head",))
SOME_TRIPLETS = AdaLora(
    type="adalora", init_r=4, target_r=2, layers_to_transform=(0, 1), target_modules=("q_proj", "down_proj")
)


_references: dict[str, Trained] = {}


def check(sizes: dict[str, int], micro_batches: int, remat: str, virtual: int, model: Any = LAYERS, **how: Any) -> None:
    with jax.enable_x64(True):
        of_pipeline = dict(micro_batches=micro_batches, remat=remat, virtual_stages=virtual)
        ours = train(llama(**model), mesh_layout(**sizes), dtype="float64", **of_pipeline, **how)
        if (key := repr((model, how))) not in _references:
            _references[key] = train(llama(**model), dtype="float64", **how)
        assert_trained_alike(ours, _references[key], TOLERANCE)


def test_two_chunks_a_stage_with_tied_heads_over_data_and_tensor():
    check(dict(pipeline=2, data=2, tensor=2), 4, "none", 2, TIED)


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "micro_batches", "remat", "virtual", "how"),
    [
        (dict(pipeline=2, context=2, fsdp=2), 2, "full", 2, {}),
        (dict(pipeline=2), 4, "none", 2, dict(method=SOME_TRIPLETS)),
        (dict(pipeline=2, fsdp=2, tensor=2), 4, "full", 2, dict(method=DORA, dropout=0.2)),
    ],
    ids=str,
)
def test_meshes_and_what_trains(sizes, micro_batches, remat, virtual, how):
    check(sizes, micro_batches, remat, virtual, **how)


@pytest.mark.full
def test_four_chunks_of_a_layer_each():
    check(dict(pipeline=2, data=2, fsdp=2), 8, "none", 4, dict(num_hidden_layers=8))


@pytest.mark.full
def test_a_layer_is_rounded_at_random_by_the_same_bits_wherever_it_is():
    slow = Lomo(type="lomo", learning_rate=2.0**-10, weight_decay=1.0, schedule=Constant(type="constant", warmup=0))
    batch = ragged_batch(0)
    batch["loss_mask"][:] = 0  # no gradient, which other meshes would sum in another order: the decay alone
    rounded = []
    for layout, how in (None, {}), (mesh_layout(pipeline=2), dict(micro_batches=2, virtual_stages=2)):
        rule = dict(optimizer=slow, dtype="bfloat16", stochastic_rounding=True, max_grad_norm=None)
        made = program(llama(**LAYERS), layout, **rule, **how)
        state, _ = made.compiled.run(made.start(), made.place(batch, how.get("micro_batches", 1)))
        params = rearranged(state.params, np.argsort(made.lm.layer_order))
        rounded.append(jax.tree.map(np.asarray, params["layers"]))
    jax.tree.map(np.testing.assert_array_equal, *rounded)


@pytest.mark.full
@pytest.mark.optimized
def test_memory_does_not_grow_with_the_micro_batches():
    """But for the ids of the batch's tokens, which are laid out anew."""

    def compiled(micro_batches: int) -> Any:
        how = dict(micro_batches=micro_batches, virtual_stages=2, shape=(8 * micro_batches, 32))
        return program(llama(**LAYERS), mesh_layout(pipeline=2, data=2, fsdp=2), **how).compiled

    few, many = compiled(4), compiled(12)
    assert 0 <= many.temp_bytes - few.temp_bytes <= (many.argument_bytes - few.argument_bytes) / 4


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 1, 5)])
def test_the_ticks_are_those_of_the_schedule(stages, virtual, micro_batches):
    """Every stage makes every pass once, one tick after the stage before it, and waits in p − 1 ticks each way."""
    ticks = Schedule(stages, micro_batches, virtual=virtual)
    assert ticks.warm_up + ticks.steady == virtual * micro_batches + stages - 1
    assert ticks.bubble == (stages - 1) / (virtual * micro_batches + stages - 1)
    chunks, micro = of_pass(np.arange(ticks.work), stages, virtual)
    made = list(zip(chunks.tolist(), micro.tolist(), strict=True))
    assert sorted(made) == [(r, i) for r in range(virtual) for i in range(micro_batches)]
    when = {which: u for u, which in enumerate(made)}  # on the first stage; s ticks later on stage s
    for (chunk, i), u in when.items():
        if chunk:
            assert u == when[chunk - 1, i] + stages  # a tick after the last stage had it
    # The last stage ends the first micro-batch when the ticks forward are over.
    assert when[virtual - 1, 0] + stages - 1 == ticks.warm_up


# Whole runs


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("interleaved"), shared) as path:
        yield path


def run(config: Any, name: str, *more: str) -> whole_runs.Ran:
    changes = (f"output_dir={config.parent / name}", "train.micro_batch_size=1", "train.steps=4")
    size = ("train.batch_size=16", "model.num_hidden_layers=6", "checkpoint.every=2")
    return whole_runs.train(config, *changes, *size, *more, devices=8)


# Three chunks: the order of two is its own inverse, and which of them was applied would not be seen.
VIRTUAL = ("mesh={pipeline: 2, data: 2, tensor: 2}", "train.virtual_stages=3")


@pytest.fixture(scope="module")
def ran(config):
    return run(config, "interleaved", *VIRTUAL)


@pytest.mark.full
def test_a_run_is_that_of_another_mesh_and_its_checkpoints_are_in_the_layers_order(config, ran):
    assert ran.status == 0
    lines = read_metrics(ran.folder)
    assert next(line for line in lines if "train/loss" in line)["perf/bubble"] == pytest.approx(1 / 25)
    assert "2 stages of 3 chunks and 8 micro-batches: 5 ticks forward, 20 forward and backward" in ran.said
    names = ("train/loss", "train/grad_norm", "eval/held_out/loss")

    def values(folder: Any, after: int = 0) -> list[float]:
        return [line[n] for line in read_metrics(folder) if line["step"] > after for n in names if n in line]

    plain = run(config, "plain", "mesh={data: 2, fsdp: 4}")
    np.testing.assert_allclose(values(ran.folder), values(plain.folder), rtol=1e-4)
    for name, start, mesh in [("there", ran, ("mesh={fsdp: 8}",)), ("here", plain, VIRTUAL)]:
        went_on = run(config, name, *mesh, f"checkpoint.resume={start.folder / 'checkpoints/2'}")
        assert len(values(went_on.folder)) == 5
        np.testing.assert_allclose(values(went_on.folder), values(plain.folder, after=2), rtol=1e-4)


@pytest.mark.full
def test_a_run_goes_on_with_the_same_bits_and_exports_what_its_checkpoint_holds(config, ran, tmp_path):
    again = run(config, "again", *VIRTUAL, f"checkpoint.resume={ran.folder / 'checkpoints/2'}")
    last = checkpoints(again.folder / "checkpoints")[-1]
    assert convert(["to-hf", str(last), str(tmp_path / "exported")]) == 0
    kernels = []
    for folder in (ran.folder / "export/hf", again.folder / "export/hf", tmp_path / "exported"):
        kernels.append(jax.tree.map(np.asarray, load_hf(folder)[1]))
    jax.tree.map(np.testing.assert_array_equal, *kernels[:2])
    jax.tree.map(np.testing.assert_array_equal, *kernels[1:])


# Bad input

SIZES: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "model"},
    "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 128},
    "optim": {"type": "adalomo", "learning_rate": 1e-3},
    "mesh": {"pipeline": 2, "fsdp": 1},
    "train": {"steps": 1, "batch_size": 4, "virtual_stages": 2},
}


def test_chunks_of_no_pipeline_are_refused():
    with pytest.raises(ValueError, match=r"virtual_stages is 2, .* and mesh\.pipeline is 1; set mesh\.pipeline"):
        Config.model_validate({**SIZES, "mesh": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.batch_size=6", "train.micro_batch_size=2"], r"6 is 3 micro-batches .* go round together; .* 4 or 8"),
        (["train.virtual_stages=3"], r"the 2 layers of each of the 2 stages do not divide .* = 3; .* that work: 2"),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_refused(config, changes, message):
    sizes = ("mesh={pipeline: 2, fsdp: 1}", "train.virtual_stages=2", "train.batch_size=4")
    with pytest.raises(UserError, match=message):
        whole_runs.train(config, "model.num_hidden_layers=4", *sizes, "train.micro_batch_size=1", *changes, devices=2)
