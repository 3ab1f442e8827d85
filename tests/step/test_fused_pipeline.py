"""The fused step on a pipeline: equal to the ordinary one on one device, with the gradient of one layer at a time."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm.core import tree
from jaxllm.models.pipeline_schedule import Schedule
from jaxllm.objectives.base import CrossEntropy
from jaxllm.optim.build import OPTIMIZERS
from jaxllm.peft.lora import Lora
from tests.support import whole_runs
from tests.support.families import mesh_layout
from tests.support.optimizers import section
from tests.support.small_runs import Trained, assert_trained_alike, llama, program, train
from tests.support.whole_runs import read_metrics, workplace

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10

LAYERS, TIED = dict(num_hidden_layers=4), dict(num_hidden_layers=4, tie_word_embeddings=True, num_key_value_heads=2)
NO_CLIP = dict(max_grad_norm=None)


_references: dict[str, Trained] = {}


def ordinary(name: str, model: dict[str, Any], how: dict[str, Any]) -> Trained:
    """On one device, the whole batch at once; each such run once a session."""
    key = repr((name, model, how))
    if key not in _references:
        _references[key] = train(llama(**model), optimizer=section(name), dtype="float64", **how)
    return _references[key]


def check(name: str, model: dict[str, Any], sizes: dict[str, int], micro_batches: int, **how: Any) -> None:
    with jax.enable_x64(True):
        options = dict(optimizer=section(name), micro_batches=micro_batches, dtype="float64", fused=True)
        ours = train(llama(**model), mesh_layout(**sizes), **options, **how)
        assert_trained_alike(ours, ordinary(name, model, how), TOLERANCE)


def test_data_and_tensor_parallel_stages_with_tied_heads_clipped_by_two_walks():
    check("lomo", TIED, dict(pipeline=2, data=2, tensor=2), 8)


def test_sharded_stages_with_moments_and_dropout():
    check("adamw", LAYERS, dict(pipeline=4, fsdp=2), 4, dropout=0.2, **NO_CLIP)


MESHES = [
    ("adalomo", dict(pipeline=2)),
    ("lion", dict(pipeline=4)),
    ("adalomo", dict(pipeline=2, data=4)),
    ("adafactor", dict(pipeline=2, fsdp=4)),
    ("muon", dict(pipeline=2, tensor=4)),
    ("adan", dict(pipeline=4, data=2)),
    ("galore", dict(pipeline=4, tensor=2)),
    ("adalomo", dict(pipeline=2, data=2, fsdp=2)),
    ("schedule_free_adamw", dict(pipeline=2, fsdp=2, tensor=2)),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "sizes"), MESHES, ids=str)
def test_every_mesh(name, sizes):
    """Tied and untied models, clipping and the number of micro-batches in turn."""
    assert not OPTIMIZERS[name].needs_whole_model
    turn = MESHES.index((name, sizes))
    check(name, (TIED, LAYERS)[turn % 2], sizes, (4, 8)[turn // 2 % 2], **({}, NO_CLIP)[turn // 4 % 2])


DORA = Lora(type="lora", r=2, use_dora=True, lora_dropout=0.2, modules_to_save=("lm_head",))
KINDS = {
    "adapters": ("adamw", dict(method=DORA)),
    "the objective, clamped values and frozen leaves": (
        "lomo",
        dict(objective=CrossEntropy(0.1, 1e-2), frozen=("embed/*", "*/q/kernel"), max_grad_value=1e-2),
    ),
    "only the layers train": ("adamw", dict(frozen=("embed/*", "head/*", "norm/*"))),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_and_what_for(kind):
    name, how = KINDS[kind]
    check(name, LAYERS, dict(pipeline=2, fsdp=2, tensor=2), 4, **how)


@pytest.mark.full
def test_bfloat16_is_rounded_at_random_as_without_a_pipeline():
    """The bits that round a layer are those of its place in the model, and not in its stage."""
    options: dict[str, Any] = dict(optimizer=section("lomo"), dtype="bfloat16", compute_dtype="float32", fused=True)
    ours, theirs = (
        train(llama(**LAYERS), layout, steps=1, micro_batches=4, stochastic_rounding=True, **options)
        for layout in (mesh_layout(pipeline=2), None)
    )
    for path in (path for path in theirs.state if path.startswith("params/layers/")):
        assert (theirs.state[path] == ours.state[path]).mean() > 0.99, path


# Memory

DEEP = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
ROWS, LENGTH, STAGES = 4, 16, 4


@cache
def temporaries(layers: int, micro_batches: int, fused: bool = True) -> int:
    made = program(
        llama(num_hidden_layers=layers, **DEEP),
        mesh_layout(pipeline=STAGES),
        micro_batches=micro_batches,
        shape=(ROWS * micro_batches, LENGTH),
        optimizer=section("lomo"),
        fused=fused,
        max_grad_norm=None,
    )
    leaves = tree.flatten(made.lm.abstract()["layers"]).values()
    assert made.compiled.in_place_bytes >= sum(4 * leaf.size for leaf in leaves) / STAGES
    return made.compiled.temp_bytes


INPUT = ROWS * LENGTH * DEEP["hidden_size"] * 4
LAYER = 4 * (4 * DEEP["hidden_size"] ** 2 + 3 * DEEP["hidden_size"] * DEEP["intermediate_size"])


@pytest.mark.full
@pytest.mark.optimized
def test_one_layer_has_a_gradient_at_a_time():
    """Six more layers in each stage keep their inputs, and have neither gradients nor copies of their weights, which
    the ordinary step has of all."""
    kept = 4 * 6 * INPUT
    assert temporaries(32, 4) - temporaries(8, 4) <= kept + LAYER / 8
    assert temporaries(32, 4, fused=False) - temporaries(32, 4) > 8 * LAYER - 4 * 8 * INPUT


@pytest.mark.full
@pytest.mark.optimized
def test_memory_grows_by_what_is_kept_of_a_micro_batch():
    """The inputs of a stage's layers; the gradient of what it gives, noted, on its way down, and a layer further."""
    assert temporaries(32, 12) - temporaries(32, 4) <= 8 * (8 + 3) * INPUT + 2**14


def test_walks_are_counted_in_the_share_of_waiting():
    """Passes of p − 1 micro-batches are waited for, beside those of m and one or two walks that take as long."""
    assert [Schedule(4, 8, walks).bubble for walks in (0, 1, 2)] == [3 / 11, 3 / 19, 3 / 27]


# Whole runs


def run(config: Any, name: str, mesh: str, *more: str) -> whole_runs.Ran:
    changes = (f"output_dir={config.parent / name}", f"mesh={mesh}", "train.micro_batch_size=1", "train.steps=4")
    changes += ("train.batch_size=16", "checkpoint.every=2", "checkpoint.keep=9", "train.update=fused")
    return whole_runs.train(config, *changes, "optim={type: adalomo, learning_rate: 1e-2}", *more, devices=8)


@pytest.mark.full
def test_a_run_goes_on_with_the_same_bits_and_on_another_mesh(tmp_path, shared):
    with workplace(tmp_path, shared) as config:
        whole = run(config, "whole", "{pipeline: 2, data: 2, tensor: 2}")
        assert whole.status == 0
        assert (
            "2 stages and 8 micro-batches: 1 ticks forward, 8 forward and backward, 1 backward, and two" in whole.said
        )
        start = f"checkpoint.resume={whole.folder / 'checkpoints/2'}"
        again = run(config, "again", "{pipeline: 2, data: 2, tensor: 2}", start)
        there = run(config, "there", "{fsdp: 8}", start)
    ours, theirs, other = (load_file(one.folder / "export/hf/model.safetensors") for one in (again, whole, there))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    for name, leaf in theirs.items():
        np.testing.assert_allclose(other[name], leaf, rtol=0, atol=1e-4 * np.abs(leaf).max(), err_msg=name)
    losses = [
        [line["train/loss"] for line in read_metrics(one.folder) if "train/loss" in line] for one in (again, whole)
    ]
    assert losses[0] == losses[1][2:]
