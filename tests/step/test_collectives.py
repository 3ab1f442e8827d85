"""What the devices of a mesh send one another in a step, counted in the compiled program against a written budget.

Arrays are counted as often as they are sent, single numbers left out: so the counts depend neither on what XLA sends
together nor on how it turns a loop. XLA's CPU compiler writes a reduce-scatter as an all-reduce of which each device
keeps a part; programs for GPUs, which need none, are counted too.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import yaml

from jaxllm.core.config import load
from jaxllm.plan.plan import plan
from jaxllm.runs.config import Config
from tests.support.collectives import Collective, collectives, counted

ROOT = Path(__file__).parents[2]


def assert_nothing_is_gathered_whole(found: Iterable[Collective], vocabulary: int, layers: int) -> None:
    """No device is sent the whole vocabulary, of logits or of a matrix, nor the matrices of all `layers`."""

    def is_whole(kind: str, shape: tuple[int, ...]) -> bool:
        of_layers = len(shape) > 2 and shape[0] == layers and sum(n > 1 for n in shape[1:]) > 1
        return (vocabulary in shape and len(shape) > 1) or (kind == "all-gather" and of_layers)

    whole = [(one.kind, shape, one.where) for one in found for _, shape in one.arrays if is_whole(one.kind, shape)]
    assert whole == []


# Recipes, on eight simulated devices


class Budget(NamedTuple):
    """Arrays, for each layer in a micro-batch and for a micro-batch beside.

    gathered: over fsdp. A layer's seven matrices are gathered to go forward and again to go back; beside the layers,
    what the loss and the embedding need of all tokens (ids, targets, what the head reads, its gradient, and numbers of
    each token). reduced: the gradients of a layer's seven matrices and two norms; beside, four of all tokens
    (embeddings, the softmax's maximum and sum, the gradient of what the head reads) and the last norm's gradient.
    """

    gathered: tuple[int, int] = (14, 8)
    reduced: tuple[int, int] = (9, 6)


ORDINARY = Budget()
BUDGETS = {
    "pretrain": Budget((14, 11), (9, 7)),  # the embedding in two chunks: each sends tokens, embeddings and a gradient
    # Beside each of the seven matrices two or three of an adapter's leaves, of which one is gathered and two are
    # reduced; the matrices themselves have no gradient. Of one in few bits, the codes and the scales are gathered.
    "lora": Budget((28, 7), (14, 5)),
    "dora": Budget((36, 7), (33, 5)),
    "adalora": Budget((28, 7), (19, 19)),
    "qlora": Budget((32, 7), (14, 5)),
    "prompt_tuning": Budget((14, 7), (0, 6)),
    # Two of six layers have gradients. The loop past the others has no known length, and its body counts once.
    "lisa": Budget((13, 7), (3, 6)),
    # Clipped: the norm is known from one walk back, the updates are made in another.
    "lomo": Budget((21, 8), (18, 6)),
    # Statistics of rows and columns, one matrix after the other, or of all layers at once.
    "adalomo": Budget((14, 16), (42, 7)),
    "adafactor": Budget((14, 14), (14, 7)),
    # One matrix after the other: whole for a decomposition now and then, and for the products of each iteration.
    "galore": Budget((14 + 7 * 5, 8), (9 + 7, 6)),
    "muon": Budget((14 + 60, 8), (9 + 22, 6)),
    # The gradient, and once in a while that of drawn targets.
    "sophia_g": Budget((28, 16), (18, 13)),
}

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"), key=lambda path: (len(path.parts), path.stem))
PLAIN = ("finetune", "lora")


def _tier(recipe: str) -> str:
    """The full tier has the recipes with a budget of their own, and the tables those with an ordinary optimizer's."""
    return "full" if recipe in BUDGETS else "tables"


@pytest.mark.optimized
@pytest.mark.parametrize(
    "recipe",
    [
        path if path.stem in PLAIN else pytest.param(path, marks=getattr(pytest.mark, _tier(path.stem)))
        for path in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_a_recipe_keeps_to_its_budget(recipe: Path, shared: Path) -> None:
    changes = ["data.sources.0.path=nowhere"]
    if "type: llama" in (text := recipe.read_text()):
        changes += ["model.tokenizer=nowhere", "model.vocab_size=2112"]
    else:
        # A micro-batch has fewer tokens than the vocabulary: no array of tokens is taken for a matrix.
        changes += [f"model.path={shared / 'models/stories3M'}", "data.seq_len=128"]
    if "fused" not in text and "lisa" not in text:
        changes.append("train.unroll=1")
    planned = plan(config := load(recipe, changes, Config), jax.devices())
    found = collectives(planned.compiled.run.as_text(), planned.lm.layout.mesh.shape)
    layers, (micro_batches, _) = planned.lm.config.num_hidden_layers, config.train.accumulation(planned.lm.layout)
    assert_nothing_is_gathered_whole(found, planned.lm.vocab_padded, layers)
    sent = counted(found)
    budget = BUDGETS.get(recipe.stem, ORDINARY)
    for kind, (of_layer, beside) in (("all-gather", budget.gathered), ("all-reduce", budget.reduced)):
        assert sent.pop((kind, ("fsdp",))) <= micro_batches * (layers * of_layer + beside), (kind, found)
    assert sent == {}


# Layouts, compiled for eight H100s

LAYERS, VOCABULARY = 3, 5120  # not the number of rows, nor any width
MATRICES = 7 * LAYERS
GPU_CONFIG = {
    "output_dir": "run",
    "model": {
        "type": "llama",
        "tokenizer": "nowhere",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "data": {"sources": [{"path": "nowhere"}], "seq_len": 512},
    "optim": {"type": "adamw", "learning_rate": 1e-2},
    "train": {"steps": 10, "batch_size": 16, "micro_batch_size": 1},
}
PROGRAM = """
import json, sys
from jaxllm.core.config import load
from jaxllm.plan.plan import plan
from jaxllm.plan.targets import compile_only_devices, target_named
from jaxllm.runs.config import Config

planned = plan(load(sys.argv[1], json.loads(sys.argv[2]), Config), compile_only_devices(target_named("h100"), 8))
print(json.dumps(dict(planned.lm.layout.mesh.shape)))
print(planned.compiled.run.as_text())
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's compiler is for Linux alone")


def on_gpus(folder: Path, *changes: str) -> list[Collective]:
    """Those of a small Llama's step on H100s that need not be there, in a process that has CUDA's plugin."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(GPU_CONFIG), encoding="utf-8")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROGRAM, str(path), json.dumps(changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    mesh, _, text = done.stdout.partition("\n")
    found = collectives(text, json.loads(mesh))
    assert_nothing_is_gathered_whole(found, VOCABULARY, LAYERS)
    return found


def assert_within(found: Iterable[Collective], micro_batches: int, budget: dict[str, tuple[int, int]]) -> None:
    """budget: of each kind and its axes, the arrays of a micro-batch, and those of a step beside."""
    allowed = Counter({name: micro_batches * each + beside for name, (each, beside) in budget.items()})
    sent = Counter({" ".join((kind, *over)): n for (kind, over), n in counted(found).items()})
    assert sent - allowed == {}, sent


def assert_reduced_once(found: Iterable[Collective], dtype: str = "f32") -> None:
    """Over data, by default in float32, whatever the gradients were computed in. Losses are in float32 in any case."""
    over_data = [one for one in found if one.over == ("data",)]
    assert {(one.kind, one.times) for one in over_data} == {("all-reduce", 1)}
    assert {kind for one in over_data for kind, shape in one.arrays if math.prod(shape) > 2} == {dtype}


@on_linux
def test_hybrid_sharding(tmp_path):
    """Over fsdp each micro-batch gathers each matrix twice and scatters its gradient; over data the shards of the
    gradients are summed, once a step."""
    found = on_gpus(tmp_path, "mesh={data: 2, fsdp: 4}")
    budget = {
        "all-gather fsdp": (2 * MATRICES + 8, 0),
        "reduce-scatter fsdp": (MATRICES + 5, 0),
        "all-reduce fsdp": (3, 0),  # the gradients of the norms
        "all-reduce data": (0, 12),  # one for each kind of parameter, if XLA leaves them apart
        "all-reduce data fsdp": (0, 1),
    }
    assert_within(found, 2, budget)
    assert_reduced_once(found)


@pytest.mark.full
@on_linux
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_sent_in_bfloat16(tmp_path, micro_batches):
    """Also where there is one micro-batch."""
    size = f"train.batch_size={8 * micro_batches}"
    found = on_gpus(tmp_path, "mesh={data: 2, fsdp: 4}", "train.reduce_dtype=bfloat16", size)
    assert_reduced_once(found, "bf16")


@pytest.mark.full
@on_linux
def test_sequence_parallelism(tmp_path):
    """Over tensor, four gathers and scatters of activations in a layer in place of all-reduces, and four gathers more
    to go back."""
    mesh, micro_batch = "mesh={data: 2, fsdp: 2, tensor: 2, rules: {act_length: [tensor]}}", "train.micro_batch_size=2"
    found = on_gpus(tmp_path, mesh, micro_batch)
    budget = {
        "all-gather fsdp": (2 * MATRICES + 9, 0),
        "reduce-scatter fsdp": (MATRICES + 1, 0),
        "all-reduce fsdp": (2, 0),
        "all-gather tensor": (8 * LAYERS + 3, 0),
        "reduce-scatter tensor": (4 * LAYERS, 0),
        "all-reduce tensor": (1, 0),  # the gradients of the norms
        "all-reduce fsdp tensor": (4, 1),  # in the loss and the embedding
        "all-reduce data": (0, 12),
        "all-reduce data fsdp": (0, 1),
    }
    assert_within(found, 2, budget)
    assert_reduced_once(found)


@pytest.mark.full
@on_linux
def test_a_pipeline(tmp_path):
    """A tick hands on the activations of a micro-batch and their gradients; weights are never sent."""
    found = on_gpus(tmp_path, "mesh={pipeline: 2, data: 2, fsdp: 1, tensor: 2}", "model.num_hidden_layers=4")
    of_a_stage = 2
    budget = {
        "collective-permute pipeline": (3, 1),
        "all-reduce tensor": (5 * of_a_stage, 5 * of_a_stage),  # two forward, three back; a tick more of each
        "all-reduce pipeline tensor": (4, 4),  # embedding and loss
        "all-reduce pipeline": (4, 4),  # what the last stage gives to the head and gets from it, and flags
        "all-reduce data": (0, 12),
    }
    assert_within(found, 8, budget)
    assert_reduced_once(found)


@pytest.mark.full
@on_linux
def test_a_pipeline_of_virtual_stages(tmp_path):
    """Twice the ticks, of half the layers each. Weights are never sent, wherever their layers are in the model."""
    mesh, layers = "mesh={pipeline: 2, data: 2, fsdp: 1, tensor: 2}", "model.num_hidden_layers=4"
    found = on_gpus(tmp_path, mesh, layers, "train.virtual_stages=2")
    over_stages = [one for one in found if "pipeline" in one.over]
    assert {one.kind for one in over_stages} == {"collective-permute", "all-reduce"}
    assert_within(
        over_stages,
        8,
        {
            "collective-permute pipeline": (2 * 3, 2),
            "all-reduce pipeline tensor": (2 * 4, 8),
            "all-reduce pipeline": (2 * 6, 8),  # and which chunk and micro-batch a stage is at
        },
    )
    of_stages = [shape for one in over_stages if one.over == ("pipeline",) for _, shape in one.arrays]
    # Rows of activations, or the few sums from which a step tells whether it is a bad one.
    assert all(shape[-2:] == (512, 256) or math.prod(shape) <= 4 for shape in of_stages)
    assert_reduced_once(found)


@pytest.mark.full
@on_linux
def test_a_part_of_the_optimizers_state_each(tmp_path):
    """Over data each kind of parameter's gradient is scattered once a step, and what is updated gathered once."""
    mesh, layers = "mesh={pipeline: 2, data: 2, fsdp: 1, tensor: 2}", "model.num_hidden_layers=4"
    found = on_gpus(tmp_path, mesh, layers, "train.shard_optimizer=true")
    over_data = [one for one in found if one.over == ("data",)]
    assert_within(over_data, 8, {"reduce-scatter data": (0, 12), "all-gather data": (0, 12), "all-reduce data": (0, 2)})
    assert {dtype for one in over_data for dtype, _ in one.arrays} == {"f32"}
    assert {len(shape) for one in over_data if one.kind == "all-reduce" for _, shape in one.arrays} <= {0, 1}


@pytest.mark.full
@on_linux
def test_fused_and_clipped(tmp_path):
    """A walk forward and two back gather each matrix, and the two back scatter its gradient."""
    found = on_gpus(tmp_path, "mesh={fsdp: 8}", "optim.type=adalomo", "train.update=fused")
    budget = {
        "all-gather fsdp": (3 * MATRICES + 9, 9),
        "reduce-scatter fsdp": (2 * MATRICES + 5, 0),
        "all-reduce fsdp": (0, 10 * LAYERS + 6),  # gradients of norms, and statistics of rows and columns
    }
    assert_within(found, 2, budget)
    reduced = [shape for one in found if one.kind == "all-reduce" for _, shape in one.arrays]
    assert max(map(len, reduced)) == 1  # no matrix
