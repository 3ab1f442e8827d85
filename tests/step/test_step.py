"""The training step: on a small Llama, and on losses of one line where only its arithmetic matters."""

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxllm import optim
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.models.stack import NamedTensors, Remat, check_offload, loop, scan
from jaxllm.nn.checkpoint_names import TENSOR_NAMES
from jaxllm.objectives.base import CROSS_ENTROPY, Losses, Objective
from jaxllm.optim.build import build
from jaxllm.step.at_once import AtOnce
from jaxllm.step.batch import batch_shapes
from jaxllm.step.compile import CompiledStep, compile_steps
from jaxllm.step.gradient import accumulated
from jaxllm.step.state import TrainState, new_state
from jaxllm.step.update import make_step
from tests.support.families import mesh_layout, small_lm
from tests.support.small_runs import (
    MAX_GRAD_NORM,
    OPTIMIZER,
    STEPS,
    Program,
    assert_trained_alike,
    llama,
    program,
    ragged_batch,
    train,
)

# A transform whose state after one step is the gradient that it got.
RECORD = optax.trace(0.9)

FROZEN = ("embed/*", "*/q/kernel")


@cache
def partly_frozen() -> Program:
    """AdamW on a Llama with biases over eight devices, part of it frozen; compiled once, as in a run."""
    config = llama(attention_bias=True, mlp_bias=True)
    return program(config, mesh_layout(data=2, fsdp=2, tensor=2), frozen=FROZEN)


def step_once(made: Program, **changes: Any) -> tuple[TrainState, TrainState, dict[str, float]]:
    """The state before and after a step with a changed batch, and the metrics."""
    before = jax.tree.map(np.array, made.start())
    batch = made.place({**ragged_batch(0), **changes})
    after, metrics = made.compiled.run(made.start(), batch)
    return before, jax.tree.map(np.asarray, after), jax.tree.map(float, metrics)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), ours, theirs)
    assert all(jax.tree.leaves(same)), same


@pytest.mark.optimized
def test_every_byte_of_the_state_is_reused():
    made = partly_frozen()
    state = made.start()
    on_one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    memory = made.compiled.run.memory_analysis()
    _, metrics = made.compiled.run(state, made.place(ragged_batch(0)))
    # Scalars of 4 bytes, which are new; the result is a table of pointers besides.
    new = 4 * len(metrics) + 8 * (len(metrics) + len(jax.tree.leaves(state)))
    assert memory.alias_size_in_bytes == on_one_device
    assert memory.output_size_in_bytes <= on_one_device + new
    assert made.compiled.peak_bytes <= made.compiled.argument_bytes + made.compiled.temp_bytes + new
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.optimized
def test_the_state_stays_split_over_the_devices():
    made = partly_frozen()
    state, _ = made.compiled.run(made.start(), made.place(ragged_batch(0)))
    wanted = tree.flatten(made.lm.shardings())
    moments = [tree.flatten(optax.tree.get(state.opt_state, moment)) for moment in ("mu", "nu")]
    for leaves in (tree.flatten(state.params), tree.flatten(state.frozen), *moments):
        for path, leaf in leaves.items():
            assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
    head = state.params["head"]["kernel"]
    assert head.addressable_shards[0].data.size == head.size / 4  # fsdp and tensor, two ways each


@pytest.mark.optimized
def test_frozen_leaves_keep_their_bits_and_have_no_state():
    made = partly_frozen()
    before, after, metrics = step_once(made)
    assert_same_bits(after.frozen, before.frozen)
    frozen, moving = tree.flatten(after.frozen), tree.flatten(after.params)
    assert set(frozen) == {"embed/table", "layers/attn/q/kernel"}
    assert set(frozen) | set(moving) == set(tree.flatten(made.lm.abstract()))
    old = tree.flatten(before.params)
    assert {path for path, leaf in moving.items() if (leaf == old[path]).all()} == set()
    for moment in ("mu", "nu"):
        assert set(tree.flatten(optax.tree.get(after.opt_state, moment))) == set(moving)
    # The norm that clips is the one of what trains: the first moment is 0.1 times the clipped gradient.
    moments = optax.tree.get(after.opt_state, "mu")
    clipped = np.sqrt(sum((leaf.astype(float) ** 2).sum() for leaf in jax.tree.leaves(moments))) / 0.1
    assert metrics["grad_norm"] > MAX_GRAD_NORM
    np.testing.assert_allclose(clipped, MAX_GRAD_NORM, rtol=1e-5)


@pytest.mark.optimized
def test_weight_decay_goes_by_path():
    """Without a gradient (no token is trained) matrices shrink by rate × decay; norms and biases keep their bits."""
    before, after, metrics = step_once(partly_frozen(), loss_mask=np.zeros_like(ragged_batch(0)["loss_mask"]))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["bad"] == metrics["trained_tokens"] == 0
    rate = OPTIMIZER.learning_rate / 5  # the first of five steps of warm-up
    np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
    old = tree.flatten(before.params)
    for path, new in tree.flatten(after.params).items():
        if path.endswith("/kernel"):
            # To within a rounding or two of float32, far less than the decay itself.
            shrunk = old[path].astype(float) * (1 - rate * OPTIMIZER.weight_decay)
            np.testing.assert_allclose(new, shrunk, rtol=2e-7)
            assert (new != old[path]).mean() > 0.9
        else:
            assert path.endswith(("/bias", "/scale"))
            assert_same_bits(new, old[path])


@pytest.mark.optimized
def test_a_loss_that_is_not_finite_changes_nothing():
    mask = ragged_batch(0)["loss_mask"]
    mask[-1, 0] = np.nan
    before, after, metrics = step_once(partly_frozen(), loss_mask=mask)
    assert not np.isfinite(metrics["loss"])
    assert metrics["bad"] == 1
    # The schedule counts what was applied, so the next step's rate is the one that this step did not use.
    assert_same_bits(after, before)


# Walks over the layers, in float64: rounding is no excuse (DESIGN, section 5).

WALKS = {"scan none": scan("none"), "scan dots": scan("dots")}
MORE_WALKS = {
    "scan full": scan("full"),
    "loop full": loop("full"),
    "unrolled": scan("dots", unroll=2),
    "no loop": scan("full", unroll="all"),
    "offloaded": scan("offload_dots"),
    "named": scan(NamedTensors(save=("attn_q", "attn_context", "mlp_hidden"), offload=("mlp_gate",))),
}


@cache
def one_step(walk: str):
    """Loss and gradients with the layers walked one way, of batches with two micro-batches."""
    stack = {**WALKS, **MORE_WALKS, "loop none": loop("none")}[walk]
    config = llama(num_key_value_heads=2)
    return train(config, steps=1, dtype="float64", stack=stack, tx=RECORD, max_grad_norm=None, micro_batches=2)


@pytest.mark.parametrize("walk", [*WALKS, *(pytest.param(walk, marks=pytest.mark.full) for walk in MORE_WALKS)])
def test_every_walk_is_the_plain_loop(walk):
    with jax.enable_x64(True):
        assert_trained_alike(one_step(walk), one_step("loop none"), 1e-10)


@pytest.mark.full
@pytest.mark.optimized
def test_remat_saves_memory():
    """Of a deep model on long rows, where what the backward pass finds saved is most of the memory."""
    config = llama(num_hidden_layers=8)
    rows, length, layers, width = 8, 128, 8, 4 * 48

    def temp_bytes(remat: Remat) -> int:
        return program(config, shape=(rows, length), stack=scan(remat), tx=optax.sgd(1.0)).compiled.temp_bytes

    none, dots, full = (temp_bytes(remat) for remat in ("none", "dots", "full"))
    assert dots < none / 2
    assert full < dots
    # What is saved by name is what is held: one array of a layer's features for each name.
    one, two = (temp_bytes(NamedTensors(save=names)) for names in (("mlp_gate",), ("mlp_gate", "mlp_up")))
    assert full < one < two < dots
    np.testing.assert_allclose(two - one, rows * length * layers * width, rtol=0.1)


def test_every_name_is_a_result_of_the_block():
    """A name that nothing has would save nothing, and say nothing."""
    lm = small_lm(llama())
    jaxpr = str(jax.make_jaxpr(lm.losses)(lm.abstract(), ragged_batch(0)))
    assert set(re.findall(r"name\[name=(\w+)\]", jaxpr)) == set(TENSOR_NAMES)


def test_host_memory_is_asked_for_before_it_is_used():
    device = SimpleNamespace(device_kind="Toy", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    for remat in ("none", "dots", "full", NamedTensors(save=("mlp_up",))):
        check_offload(remat, device)
    for remat in ("offload_dots", NamedTensors(offload=("mlp_up",))):
        with pytest.raises(UserError, match="Toy has no memory 'pinned_host' here, only device; use dots or full"):
            check_offload(remat, device)
        check_offload(remat, jax.local_devices()[0])


# Arithmetic of the step alone, on losses of one line.


class OneLine(NamedTuple):
    """Stands for a model whose summed cross entropy is `loss(params, batch)`."""

    loss: Callable[[Any, Any], jax.Array]
    dropout: float = 0.0
    adapter_dropout: float = 0.0
    aux: Any = None

    def losses(self, params: Any, batch: Any, stack: Any, objective: Objective) -> Losses:
        assert objective == CROSS_ENTROPY
        loss = self.loss(params, batch)
        return Losses(loss, loss)


def one_line(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    *,
    tx: Any = RECORD,
    schedule: optax.Schedule = lambda step: 1.0,
    max_grad_norm: float | None = None,
    trainable: Any = None,
) -> tuple[TrainState, dict[str, float]]:
    """One step on such a loss."""
    step = make_step(OneLine(loss), tx, schedule, backward=AtOnce(accumulated(scan())), max_grad_norm=max_grad_norm)
    chosen = jax.tree.map(lambda _: True, params) if trainable is None else trainable
    state, metrics = jax.jit(step)(new_state(params, chosen, tx), batch)
    return state, jax.tree.map(float, metrics)


def regression(params: Any, batch: Any) -> jax.Array:
    """The squared error of a table and a matrix."""
    y = jnp.tanh(params["table"][batch["tokens"]] @ params["kernel"]).sum(-1)
    return jnp.sum(batch["loss_mask"] * (y - batch["targets"]) ** 2)


def regression_params(dtype: str = "float64") -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    shapes = {"table": (101, 6), "kernel": (6, 4)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def cut(batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, np.ndarray]:
    return {name: a.reshape(micro_batches, -1, a.shape[-1]) for name, a in batch.items()}


def test_accumulation_is_the_big_batch():
    """Though the micro-batches train very different numbers of tokens, the first of them none."""
    with jax.enable_x64(True):
        params, batch = regression_params(), ragged_batch(3)
        trained = cut(batch, 8)["loss_mask"].sum((1, 2))
        assert trained[0] == 0
        assert trained.max() > 3 * trained[1:].min()
        total, gradient = jax.value_and_grad(regression)(params, batch)
        for micro_batches in (1, 2, 4, 8):
            state, metrics = one_line(regression, params, cut(batch, micro_batches))
            assert metrics["trained_tokens"] == trained.sum()
            np.testing.assert_allclose(metrics["loss"], total / trained.sum(), rtol=1e-12)
            for name, summed in gradient.items():
                expected = summed / trained.sum()
                atol = 1e-12 * np.abs(expected).max()
                np.testing.assert_allclose(state.opt_state.trace[name], expected, rtol=0, atol=atol)


def test_many_small_gradients_add_up_in_float32():
    """A sum in bfloat16 of 1024 equal gradients would stop at a quarter: 256 + 1 = 256."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    batch = {"tokens": np.zeros((1024, 1, 1), np.int32), "loss_mask": np.ones((1024, 1, 1), np.float32)}
    state, metrics = one_line(lambda params, batch: jnp.sum(params["w"] * batch["loss_mask"][0]), params, batch)
    np.testing.assert_array_equal(np.asarray(state.params["w"]).astype(float), 2.0)  # 1 + the mean gradient
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.1])
def test_clipping_is_that_of_torch(share):
    """Of all leaves together, to a share of the norm; a norm below the limit is left alone."""
    params, batch = regression_params("float32"), cut(ragged_batch(3), 1)
    plain, unclipped = one_line(regression, params, batch)
    weights = {name: torch.nn.Parameter(torch.zeros(leaf.shape)) for name, leaf in params.items()}
    for name, weight in weights.items():
        weight.grad = torch.tensor(np.array(plain.opt_state.trace[name]))
    limit = share * unclipped["grad_norm"]
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), limit)
    state, metrics = one_line(regression, params, batch, max_grad_norm=limit)
    # Float32, and the order of a sum of 630 squares.
    np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-6)
    for name, weight in weights.items():
        np.testing.assert_allclose(state.opt_state.trace[name], weight.grad.numpy(), rtol=2e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    """The loss √0 is finite, its slope is not."""
    params = {"w": jnp.zeros(2), "v": jnp.ones(2)}
    batch = {"tokens": np.zeros((1, 1, 1), np.int32), "loss_mask": np.ones((1, 1, 1), np.float32)}
    tx = optim.adamw(0.1, weight_decay=0.1)

    def loss(params, batch):
        return jnp.sum(jnp.sqrt(params["w"]) + params["v"])

    state, metrics = one_line(loss, params, batch, tx=tx, max_grad_norm=1.0)
    assert np.isfinite(metrics["loss"])
    assert metrics["bad"] == 1
    assert state.step == 0
    before = new_state(params, {"w": True, "v": True}, tx)
    assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))


def test_no_gradient_of_frozen_leaves_is_taken():
    """JAX refuses to differentiate integers."""
    params = {"w": jnp.ones(3), "quantized": jnp.full(3, 2, jnp.int8)}
    batch = {"tokens": np.zeros((1, 1, 1), np.int32), "loss_mask": np.ones((1, 1, 1), np.float32)}
    state, metrics = one_line(
        lambda params, batch: jnp.sum(params["w"] * params["quantized"]),
        params,
        batch,
        trainable={"w": True, "quantized": False},
    )
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(12), rtol=1e-6)
    assert state.frozen["quantized"].dtype == jnp.int8
    assert state.opt_state.trace["quantized"] is None


def test_bfloat16_parameters_have_float32_moments_and_are_rounded_once():
    params = {name: leaf.astype(jnp.bfloat16) for name, leaf in regression_params("float32").items()}
    batch = cut(ragged_batch(3), 4)
    tx, schedule = build(OPTIMIZER, STEPS)
    state, metrics = one_line(regression, params, batch, tx=tx, schedule=schedule)
    recorded, _ = one_line(regression, params, batch)
    assert state.step.dtype == jnp.int32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    for moment in ("mu", "nu"):
        moments = jax.tree.leaves(optax.tree.get(state.opt_state, moment))
        assert {leaf.dtype.name for leaf in moments} == {"float32"}
    for name, leaf in params.items():
        p, g = (np.asarray(a).astype(float) for a in (leaf, recorded.opt_state.trace[name]))
        moved = p - metrics["learning_rate"] * (g / (np.abs(g) + OPTIMIZER.eps) + OPTIMIZER.weight_decay * p)
        expected = jnp.asarray(moved, jnp.float32).astype(jnp.bfloat16)
        np.testing.assert_array_equal(state.params[name], expected)
        assert (state.params[name] != leaf).any()


def test_each_width_has_a_program_and_the_largest_is_planned_for():
    layout = Layout.single()
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated), {}, {}, ())

    def count(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return state._replace(step=state.step + 1), {"tokens": jnp.sum(batch["loss_mask"])}

    def compiled(*widths: int) -> CompiledStep:
        return compile_steps(count, state, [batch_shapes((1, 2, width), layout) for width in widths], layout)

    several = compiled(4, 16, 8)
    assert several.peak_bytes == compiled(16).peak_bytes > compiled(8).peak_bytes
    at = TrainState(jnp.zeros((), jnp.int32), {}, {}, ())
    for width in (16, 4, 8, 16):
        batch = {
            name: jnp.ones((1, 2, width), leaf.dtype) for name, leaf in batch_shapes((1, 2, width), layout).items()
        }
        at, metrics = several.run(at, batch)
        assert metrics["tokens"] == 2 * width
    assert at.step == 4
