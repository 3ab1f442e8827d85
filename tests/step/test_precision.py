"""Parameters in bfloat16, and float16 with a loss scale, against torch's GradScaler and float32."""

import shutil
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file

from jaxllm.core import tree
from jaxllm.models.stack import scan
from jaxllm.objectives.base import Losses
from jaxllm.optim.build import build
from jaxllm.step import state as state_module
from jaxllm.step.at_once import AtOnce
from jaxllm.step.gradient import accumulated
from jaxllm.step.state import SMALLEST_LOSS_SCALE, LossScale, TrainState, new_state
from jaxllm.step.update import make_step
from tests.support.small_runs import OPTIMIZER, STEPS, Program, llama, program, ragged_batch
from tests.support.whole_runs import train, workplace

# A transform whose state after one step is the gradient that it got.
RECORD = optax.trace(0.9)


@cache
def recorder(compute_dtype: str) -> Program:
    return program(llama(), tx=RECORD, max_grad_norm=None, compute_dtype=compute_dtype, micro_batches=2)


def gradients(compute_dtype: str, scale: float | None = None) -> dict[str, np.ndarray]:
    made = recorder(compute_dtype)
    state = made.start()
    if scale is not None:
        state = state._replace(loss_scale=LossScale(jnp.float32(scale), jnp.int32(0)))
    after, metrics = made.compiled.run(state, made.place(ragged_batch(0), 2))
    assert metrics["bad"] == 0
    return {path: np.asarray(leaf, float) for path, leaf in tree.flatten(after.opt_state.trace).items()}


def misses(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[float]:
    return [float(np.linalg.norm(ours[path] - g) / np.linalg.norm(g)) for path, g in theirs.items()]


def test_float16_gradients_are_those_of_float32():
    """To some roundings (2⁻¹¹ each) where the scale lifts them, and not where they are left to vanish.

    A scale of 2⁻¹² is what 4096 times as many tokens would do to them.
    """
    wanted = gradients("float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(recorder("float16").start().params)} == {"float32"}
    assert max(misses(gradients("float16", 2.0**15), wanted)) < 20 * 2**-11
    assert max(misses(gradients("float16", 2.0**-12), wanted)) > 0.05


class Slope:
    """The loss `4 w · x` in float16, whose gradient overflows where a batch and the scale are large."""

    dropout = adapter_dropout = 0.0
    aux = None

    def losses(self, params: Any, batch: Any, stack: Any, objective: Any) -> Losses:
        w, x = (a.astype(jnp.float16) for a in (params["w"], batch["x"]))
        loss = jnp.sum(4 * (w * x).astype(jnp.float32))
        return Losses(loss, loss)


def slope_step(tx: Any) -> Any:
    # Else XLA computes neighbouring float16 operations in float32, where nothing overflows.
    exact = {"xla_allow_excess_precision": False}
    return jax.jit(
        make_step(Slope(), tx, lambda step: 1.0, backward=AtOnce(accumulated(scan()))), compiler_options=exact
    )


def slope_batch(x: Any) -> dict[str, np.ndarray]:
    x = np.asarray(x, np.float32)[None]
    return {"x": x, "tokens": np.zeros((1, 1, 1), np.int32), "loss_mask": np.ones((1, 1, 1), np.float32)}


def slope_state(tx: Any, scale: float | None = None) -> TrainState:
    state = new_state({"w": jnp.array([1.0, -2.0, 0.5])}, {"w": True}, tx, scale_loss=True)
    if scale is not None:
        state = state._replace(loss_scale=LossScale(jnp.float32(scale), jnp.int32(0)))
    return state


def test_the_scale_moves_as_in_torch(monkeypatch):
    """And the parameters with it, over overflows and growth (after three good steps here, as 2000 would take long)."""
    monkeypatch.setattr(state_module, "LOSS_SCALE_GROWS_AFTER", 3)
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    sgd = torch.optim.SGD([w], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    tx = optax.sgd(0.25)
    state, step, scales = slope_state(tx), slope_step(tx), []
    rng = np.random.default_rng(0)
    for _ in range(60):
        x = (2.0 ** rng.uniform(-6, 3) * rng.standard_normal(3)).astype(np.float16)
        sgd.zero_grad()
        scaler.scale((4 * (w.half() * torch.tensor(x)).float()).sum()).backward()
        scaler.step(sgd)
        state, metrics = step(state, slope_batch(x))
        assert metrics["loss_scale"] == scaler.get_scale()
        scaler.update()
        assert state.loss_scale.scale == scaler.get_scale()
        assert metrics["bad"] == 0
        np.testing.assert_array_equal(state.params["w"], w.detach().numpy())
        scales.append(float(metrics["loss_scale"]))
    changes = np.sign(np.diff(scales))
    assert min((changes > 0).sum(), (changes < 0).sum()) >= 5
    assert state.step == 60 - (changes < 0).sum() - (state.loss_scale.scale < scales[-1])


def assert_same_bits(ours: Any, theirs: Any) -> None:
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), ours, theirs)
    assert all(jax.tree.leaves(same)), same


def test_an_overflow_changes_the_scale_alone():
    tx, _ = build(OPTIMIZER, STEPS)
    state, _ = slope_step(tx)(slope_state(tx, 2.0**12), slope_batch([0.1, 0.2, 0.3]))
    after, metrics = slope_step(tx)(state, slope_batch([0.1, 3000.0, 0.3]))
    assert (metrics["overflow"], metrics["bad"]) == (1, 0)
    assert np.isfinite(metrics["loss"])
    assert after.loss_scale.scale == 2.0**11
    assert (state.loss_scale.good_steps, after.loss_scale.good_steps) == (1, 0)
    assert_same_bits(after._replace(loss_scale=None), state._replace(loss_scale=None))


def test_where_the_scale_cannot_help_a_step_is_bad():
    """At its smallest, and where the loss itself is not finite, which no scale of the gradient mends."""
    tx = optax.sgd(0.25)
    for scale, x, loss_is_finite in ((SMALLEST_LOSS_SCALE, 60000, True), (2.0**15, np.inf, False)):
        state = slope_state(tx, scale)
        after, metrics = slope_step(tx)(state, slope_batch([0.1, 0.2, x]))
        assert np.isfinite(metrics["loss"]) == loss_is_finite
        assert not np.isfinite(metrics["grad_norm"])
        assert (metrics["overflow"], metrics["bad"]) == (0, 1)
        assert_same_bits(after, state)


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield config


HALF = ("train.compute_dtype=float16", "train.steps=8", "train.max_bad_steps=1", "evals=[]", "data.eval_fraction=0")


def test_a_float16_run_goes_on_with_its_scale(config, monkeypatch):
    """From a scale far too large: its overflows end no run, and after a resume every step has the same bits."""
    for name, value in (("FIRST_LOSS_SCALE", 2.0**23), ("LARGEST_LOSS_SCALE", 2.0**23), ("LOSS_SCALE_GROWS_AFTER", 3)):
        monkeypatch.setattr(state_module, name, value)
    whole = train(config, *HALF, f"output_dir={config.parent / 'whole'}")
    steps = [line for line in whole.metrics() if "train/loss" in line]
    overflows = [line["train/overflow"] for line in steps]
    assert overflows[0] == overflows[1] == 1
    assert 2 <= sum(overflows) < 6
    assert "step      1  not applied: the gradient overflowed float16 at a loss scale of 8.38861e+06" in whole.said

    resumed = config.parent / "resumed"
    shutil.copytree(whole.folder, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    again = train(config, *HALF, f"output_dir={resumed}")
    assert "4 of 8 steps to go" in again.said
    kept = ("train/loss", "train/grad_norm", "train/loss_scale", "train/overflow", "train/learning_rate")
    lines = [line for line in again.metrics() if "train/loss" in line]
    for ours, theirs in zip(lines, steps, strict=True):
        assert [str(ours[name]) for name in kept] == [str(theirs[name]) for name in kept]
    assert (resumed / "export/hf/model.safetensors").read_bytes() == (
        whole.folder / "export/hf/model.safetensors"
    ).read_bytes()


def test_bfloat16_parameters_train(config):
    """With float32 moments beside them, and every file of the export in bfloat16."""
    ran = train(config, "train.param_dtype=bfloat16", "train.steps=8", f"output_dir={config.parent / 'bfloat16'}")
    losses = [line["train/loss"] for line in ran.metrics() if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert not any("train/loss_scale" in line for line in ran.metrics())
    exported = load_file(ran.folder / "export/hf/model.safetensors")
    assert {tensor.dtype.name for tensor in exported.values()} == {"bfloat16"}
