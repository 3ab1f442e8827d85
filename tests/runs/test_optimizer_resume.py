"""The state of every optimizer in a checkpoint: the same bits on another mesh, and on the same one it goes on as if it
had never stopped."""

from contextlib import closing
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.checkpoint.store import Checkpoint
from jaxllm.checkpoint.writer import CheckpointWriter
from jaxllm.core import tree
from jaxllm.core.mesh import Layout
from jaxllm.models.fit_layout import fit_layout
from jaxllm.optim.build import OPTIMIZERS, SophiaG, build
from jaxllm.optim.curvature import Curvature
from jaxllm.step.state import TrainState, abstract_state
from tests.support.families import mesh_layout, small_lm
from tests.support.optimizers import section
from tests.support.small_runs import Program, llama, program, ragged_batch

SAVED, END = 3, 6
CONFIG = llama(num_hidden_layers=3)


def small_program(name: str) -> Program:
    optim = section(name)
    curvature = Curvature(optim.hessian_every, optim.rho) if isinstance(optim, SophiaG) else None
    return program(CONFIG, optimizer=optim, curvature=curvature)


def go_on(made: Program, state: TrainState, first: int, last: int) -> TrainState:
    for step in range(first, last):
        state, metrics = made.compiled.run(state, made.place(ragged_batch(step)))
        assert metrics["bad"] == 0
    return state


def on_host(state: Any) -> dict[str, np.ndarray]:
    return {path: np.array(leaf) for path, leaf in tree.flatten(state).items()}


def shapes_on(name: str, layout: Layout) -> TrainState:
    """The state's shapes on another layout."""
    lm = small_lm(CONFIG, fit_layout(CONFIG, layout))
    tx, _ = build(section(name), END, lm.padded)
    return abstract_state(lm.abstract(), jax.tree.map(lambda _: True, lm.abstract()), tx, lm.layout)


# One whose statistics are rows and columns, one with an interval; the others' states are trees like the parameters'.
PLAIN = ("adalomo", "sophia_g")


# And the other kinds of state: none, averages, a projection, a distance, two moments of one matrix.
IN_FULL = ("lomo", "adamw", "schedule_free_adamw", "galore", "prodigy", "muon", "adafactor")


@pytest.mark.parametrize(
    "name",
    [
        n if n in PLAIN else pytest.param(n, marks=pytest.mark.full if n in IN_FULL else pytest.mark.tables)
        for n in OPTIMIZERS
    ],
)
def test_an_optimizer_goes_on_with_its_state(name, tmp_path):
    made = small_program(name)
    state = go_on(made, made.start(), 0, SAVED)
    saved = on_host(state)
    with closing(CheckpointWriter(tmp_path, CheckpointConfig())) as writer:
        writer.save(SAVED, state, {})
    ends = on_host(go_on(made, state, SAVED, END))
    checkpoint = Checkpoint(tmp_path, SAVED)

    moved = checkpoint.restore(
        shapes_on(name, mesh_layout(data=2, fsdp=2, tensor=2)), paddable=small_lm(CONFIG).paddable
    )
    assert len(moved.params["head"]["kernel"].sharding.device_set) == 8
    for path, leaf in on_host(moved).items():
        wanted = saved[path]
        assert leaf[tuple(slice(size) for size in wanted.shape)].tobytes() == wanted.tobytes(), path
        assert np.count_nonzero(leaf) == np.count_nonzero(wanted), path  # padding is zero

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), made.start())
    again = on_host(go_on(made, checkpoint.restore(shapes), SAVED, END))
    assert again.keys() == ends.keys() == saved.keys()
    assert {path for path in ends if again[path].tobytes() != ends[path].tobytes()} == set()
    # Whatever has moments has gone on with them.
    unmoved = {path for path in ends if path.startswith("params") and ends[path].tobytes() == saved[path].tobytes()}
    assert unmoved == set()
