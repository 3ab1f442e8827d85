"""The optimizer's state in the host's memory (`train.offload_optimizer`).

On a CPU that is the memory of the device, under another name: where arrays lie is seen here, what is saved is not.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint.store import Checkpoint
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.host_memory import to_host
from jaxllm.core.mesh import Layout
from jaxllm.optim.build import build
from jaxllm.optim.curvature import Curvature
from jaxllm.peft.lora import Lora
from jaxllm.runs.config import Config
from jaxllm.runs.open import open_model
from jaxllm.runs.train_config import TrainConfig
from jaxllm.step.offload import in_pieces
from jaxllm.train.model import adapted
from jaxllm.train.program import Program
from tests.support.families import mesh_layout
from tests.support.optimizers import section
from tests.support.small_runs import OPTIMIZER, llama, program, ragged_batch, train
from tests.support.whole_runs import Ran, workplace
from tests.support.whole_runs import train as run

LOW_RANK = Lora(type="lora", r=3, lora_alpha=6, lora_dropout=0.1, target_modules=("q_proj", "down_proj"))
CURVATURE = Curvature(every=2, rho=0.04)
STEPS = 5


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert [path for path, leaf in ours.items() if leaf.tobytes() != theirs[path].tobytes()] == []


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        pytest.param({}, {}, marks=pytest.mark.optimized),
        pytest.param(dict(data=2, fsdp=2, tensor=2), dict(scattered=True), marks=pytest.mark.full),
        pytest.param(dict(pipeline=2, data=2), dict(micro_batches=4), marks=pytest.mark.full),
        pytest.param({}, dict(optimizer=section("sophia_g"), curvature=CURVATURE), marks=pytest.mark.full),
        # Prodigy looks at all gradients and moments before it updates any parameter.
        pytest.param({}, dict(optimizer=section("prodigy"), method=LOW_RANK), marks=pytest.mark.full),
    ],
    ids=["one device", "hybrid", "pipeline", "sophia", "adapter"],
)
def test_it_changes_no_bit(sizes, how):
    layout = mesh_layout(**sizes) if sizes else None
    ours, theirs = (train(llama(), layout, steps=STEPS, offloaded=offloaded, **how) for offloaded in (True, False))
    assert_same_bits(ours.state, theirs.state)
    for name, values in theirs.metrics.items():  # the compiler adds up the squares of a norm in another order
        np.testing.assert_allclose(ours.metrics[name], values, rtol=1e-6, err_msg=name)


def memories(state: Any) -> dict[str, str]:
    return {path: leaf.sharding.memory_kind for path, leaf in tree.flatten(state).items()}


def assert_moments_wait(state: Any) -> None:
    """Arrays of the optimizer are in the host's memory, its counters and all else on the device."""
    assert any("/nu/" in path for path in tree.flatten(state))
    for path, leaf in tree.flatten(state).items():
        waits = "/mu/" in path or "/nu/" in path
        assert leaf.sharding.memory_kind == ("pinned_host" if waits else "device"), path


@pytest.mark.optimized
def test_it_waits_there_between_steps_and_is_written_over():
    """A CPU's compiler counts it among what the device holds, as it does the new state that takes its place."""
    made = program(llama(), mesh_layout(fsdp=2, tensor=2), offloaded=True)
    state = made.start()
    assert_moments_wait(state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    after, _ = made.compiled.run(state, made.place(ragged_batch(0)))
    assert_moments_wait(after)
    assert made.compiled.in_place_bytes == held
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_moments_of_one_parameter_are_on_the_device_at_a_time():
    """In the order in which the step says it: what is brought waits until the new moments before it are back."""
    params = {name: jnp.ones((4, 3)) for name in "abc"}
    tx, _ = build(OPTIMIZER, STEPS, {})

    def step(state: Any, grads: Any) -> Any:
        def update(state: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return state, jax.tree.map(jnp.add, params, updates)

        return in_pieces(update, jax.tree.map(lambda leaf: to_host(leaf) if leaf.ndim else leaf, state))

    traced = jax.make_jaxpr(step)(tx.init(params), params)
    held, most, barriers = 0, 0, 0
    for equation in traced.jaxpr.eqns[2 * len(params) :]:  # after the moments have been put there
        barriers += equation.primitive.name == "optimization_barrier"
        if equation.primitive.name == "device_put":
            (into,) = equation.params["devices"]
            held += 1 if into == jax.memory.Space.Device else -1
            most = max(most, held)
    assert (held, most, barriers) == (0, 2, 3)


# Whole runs.


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield config


def losses(ran: Ran) -> list[float]:
    return [line["train/loss"] for line in ran.metrics() if "train/loss" in line]


@pytest.mark.full
def test_a_run_may_go_on_with_it_and_without(place):
    """And is the run that never had it, to the last bit, though checkpoints are written while it goes on."""

    def ran(name: str, steps: int, offload: bool) -> Ran:
        settings = (f"output_dir={place.parent / name}", f"train.steps={steps}", f"train.offload_optimizer={offload}")
        schedule = "optim.schedule={type: constant, warmup: 2}"
        return run(place, *settings, schedule, "checkpoint.every=1", "checkpoint.keep=4", "evals.0.every=10")

    never = ran("never", 6, False)
    ran("changed", 2, False)
    for steps, offload in ((4, True), (6, False)):
        changed = ran("changed", steps, offload)
        assert "changed, and harmless: train.steps" in changed.said
        assert f"train.offload_optimizer (there: {not offload}, now: {offload})" in changed.said
        lm = adapted(changed.config, open_model(changed.folder, Layout.single()).lm)
        shapes = Program.of(changed.config, lm, steps).state
        for step in range(3, steps + 1):
            ours, theirs = (Checkpoint(ran.folder / "checkpoints", step).restore(shapes) for ran in (changed, never))
            assert memories(ours) == memories(shapes)
            if offload:
                assert_moments_wait(ours)
            assert_same_bits(*({path: np.asarray(a) for path, a in tree.flatten(s).items()} for s in (ours, theirs)))
    assert losses(changed) == losses(never)


@pytest.mark.full
def test_the_average_of_a_schedule_free_optimizer_is_evaluated_and_exported(place):
    def ran(offload: bool) -> Ran:
        optimizer = "optim={type: schedule_free_adamw, learning_rate: 0.02, b1: 0.8}"
        how = (optimizer, "train.steps=3", "evals.0.every=3", f"train.offload_optimizer={offload}")
        return run(place, *how, f"output_dir={place.parent / f'averaged_{offload}'}")

    ours, theirs = ran(True), ran(False)
    evaluated = [
        [line["eval/held_out/loss"] for line in ran.metrics() if "eval/held_out/loss" in line] for ran in (ours, theirs)
    ]
    assert evaluated[0] == evaluated[1]
    exports = [(ran.folder / "export/hf/model.safetensors").read_bytes() for ran in (ours, theirs)]
    assert exports[0] == exports[1]


@pytest.mark.full
def test_checkpoints_of_pipelines_with_chunks(place):
    """Whose layers are stored in another order than they are held in."""

    def ran(offload: bool) -> Ran:
        how = ("mesh.pipeline=2", "mesh.fsdp=1", "train.virtual_stages=2", "model.num_hidden_layers=4")
        steps = ("train.steps=4", "evals.0.every=10", f"train.offload_optimizer={offload}")
        return run(place, *how, *steps, f"output_dir={place.parent / f'chunks_{offload}'}", devices=2)

    ours, theirs = ran(True), ran(False)
    assert losses(ours) == losses(theirs)
    saved = [Checkpoint(ran.folder / "checkpoints", 4) for ran in (ours, theirs)]
    lm = adapted(theirs.config, open_model(ours.folder, Layout.single()).lm)
    shapes = Program.of(theirs.config.model_copy(update={"mesh": Config.model_fields["mesh"].default}), lm, 4).state
    restored = [{path: np.asarray(leaf) for path, leaf in tree.flatten(one.restore(shapes)).items()} for one in saved]
    assert_same_bits(*restored)


# What it cannot do.


def test_a_device_without_such_memory_is_refused():
    device = SimpleNamespace(device_kind="Toy", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    without, with_it = (TrainConfig(steps=1, batch_size=1, offload_optimizer=offload) for offload in (False, True))
    without.check_memories(device)
    with_it.check_memories(jax.local_devices()[0])
    with pytest.raises(UserError, match=r"train\.offload_optimizer .* Toy has no memory 'pinned_host' .*set it to fal"):
        with_it.check_memories(device)
