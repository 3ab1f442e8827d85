"""Every kind of training step on families whose traits a Llama lacks: each equals the step of one device, also where it
resumes what another mesh began.

In float64, of each leaf's largest value (DESIGN, section 5).
"""

from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.checkpoint.store import Checkpoint
from jaxllm.checkpoint.writer import CheckpointWriter
from jaxllm.core.layer_order import rearranged
from jaxllm.models import FAMILIES
from jaxllm.optim.build import AdamW
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.lora import Lora
from jaxllm.step.selection import Draws
from tests.support.families import mesh_layout
from tests.support.small_runs import VOCAB, Program, Trained, assert_trained_alike, on_host, program, run

TOLERANCE = 1e-10
SIZES = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
# A window shorter than the documents.
TRAITS: dict[str, dict[str, Any]] = {
    "gemma2": dict(sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=9),
    "mistral": dict(sliding_window=3),
    "qwen3": dict(tie_word_embeddings=True, attention_bias=True),
}
# A large eps: the first update of a fresh AdamW is the sign of the gradient, whatever its last bits are.
OPTIMIZER = AdamW(type="adamw", learning_rate=3e-3, eps=1e-3, schedule=Constant(type="constant", warmup=0))
# A run resumes in the middle of an interval of LISA, which draws other layers before the last step.
STEPS, SAVED = 4, 2
METHODS: dict[str, dict[str, Any]] = {
    "everything": dict(),
    "lisa": dict(lisa=Draws(1, 3, 0)),
    "lora": dict(method=Lora(type="lora", r=2, target_modules=("q_proj", "down_proj"))),
}
MESH, STAGES = dict(data=2, fsdp=2, tensor=2), dict(pipeline=2, tensor=2)


class Way(NamedTuple):
    """How a program trains: what, on which mesh, and by which step."""

    method: str
    mesh: dict[str, int]
    how: dict[str, Any]


WAYS = {method: Way(method, {}, {}) for method in METHODS} | {
    "everything, fused, mesh": Way("everything", MESH, dict(fused=True)),
    "everything, fused, sharded optimizer, mesh": Way(
        "everything", MESH, dict(fused=True, scattered=True, micro_batches=2)
    ),
    "everything, pipeline": Way("everything", STAGES, dict(micro_batches=2)),
    "everything, sharded optimizer, pipeline": Way(
        "everything", dict(pipeline=2, data=2), dict(scattered=True, micro_batches=2)
    ),
    "lisa, mesh": Way("lisa", MESH, dict(micro_batches=2)),
    "lisa, fused, mesh": Way("lisa", MESH, dict(fused=True)),
    "lisa, fused, pipeline": Way("lisa", STAGES, dict(fused=True, micro_batches=2)),
    "lora, pipeline": Way("lora", STAGES, dict(micro_batches=2)),
}
# A run that began one way resumes in another.
RESUMED = [
    ("everything, sharded optimizer, pipeline", "everything, fused, sharded optimizer, mesh"),
    ("everything, fused, mesh", "everything, pipeline"),
    ("lisa, fused, mesh", "lisa, fused, pipeline"),
    ("lora, pipeline", "lora"),
]
FAMILY = ["gemma2", *(pytest.param(name, marks=pytest.mark.full) for name in [*TRAITS][1:])]


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@cache
def made(family: str, name: str) -> Program:
    way = WAYS[name]
    config = FAMILIES[family].config(**SIZES, **TRAITS[family])
    how = dict(optimizer=OPTIMIZER, dtype="float64", **METHODS[way.method], **way.how)
    return program(config, mesh_layout(**way.mesh) if way.mesh else None, **how)


def train(family: str, name: str, steps: range, state: Any = None) -> tuple[Any, Trained]:
    ours = made(family, name)
    micro_batches = WAYS[name].how.get("micro_batches", 1)
    state, metrics = run(ours, ours.start() if state is None else state, steps, micro_batches=micro_batches)
    return state, Trained(metrics, on_host(ours, state))


@cache
def on_one_device(family: str, method: str) -> Trained:
    return train(family, method, range(STEPS))[1]


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.mesh])
@pytest.mark.parametrize("family", FAMILY)
def test_every_step_is_that_of_one_device(family, name):
    _, ours = train(family, name, range(STEPS))
    assert_trained_alike(ours, on_one_device(family, WAYS[name].method), TOLERANCE)


@pytest.mark.parametrize(("began", "resumed"), RESUMED, ids=[" then ".join(pair) for pair in RESUMED])
@pytest.mark.parametrize("family", FAMILY)
def test_every_step_resumes_what_another_mesh_began(family, began, resumed, tmp_path):
    state, _ = train(family, began, range(SAVED))
    state = restored(state, made(family, began), made(family, resumed), tmp_path)
    _, ours = train(family, resumed, range(SAVED, STEPS), state)
    wanted = on_one_device(family, WAYS[began].method)
    metrics = {metric: values[SAVED:] for metric, values in wanted.metrics.items()}
    assert_trained_alike(ours, wanted._replace(metrics=metrics), TOLERANCE)


def restored(state: Any, ours: Program, theirs: Program, folder: Path) -> Any:
    """The state of one program as a checkpoint in `folder` gives it to another."""
    config = CheckpointConfig(every=1)
    with closing(CheckpointWriter(folder, config, ours.lm.layer_order, ours.lm.paddable)) as writer:
        writer.save(SAVED, state, {})
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), theirs.start()
    )
    state = Checkpoint(folder, SAVED).restore(shapes, paddable=theirs.lm.paddable)
    return rearranged(state, theirs.lm.layer_order)
