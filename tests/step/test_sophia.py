"""Sophia's curvature in the training step: torch's gradients of drawn labels, on any mesh, when it is due."""

from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file

from jaxllm.hf import save_hf
from jaxllm.optim.build import SophiaG
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import Constant
from jaxllm.step.batch import TARGETS, step_key, with_drawn_targets
from tests.step.test_against_torch import padded_batch
from tests.support.families import mesh_layout, small_lm, transformers_model
from tests.support.small_runs import MAX_GRAD_NORM, Trained, assert_trained_alike, llama, program, ragged_batch, train

EVERY, SEED = 2, 5
OPTIM = SophiaG(
    type="sophia_g",
    learning_rate=2e-3,
    hessian_every=EVERY,
    schedule=Constant(type="constant", warmup=0),
)
CURVATURE = Curvature(EVERY, OPTIM.rho)
HOW: dict[str, Any] = dict(optimizer=OPTIM, curvature=CURVATURE, seed=SEED, dtype="float64")


@cache
def one_device() -> Trained:
    return train(llama(), **HOW)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_every_mesh_and_accumulation_draws_the_same(sizes):
    with jax.enable_x64(True):
        ours = train(llama(), mesh_layout(**sizes), micro_batches=4, **HOW)
        assert_trained_alike(ours, one_device(), 1e-10)


def test_the_win_rate_is_what_the_curvature_scales():
    """Nothing before the first estimate; then, neither all nor nothing, while it learns."""
    with jax.enable_x64(True):
        metrics, state = one_device()
    rates = metrics["sophia_win_rate"]
    assert not rates[: EVERY - 1].any()
    assert (rates[EVERY - 1 :] > 0).all()
    assert rates.max() < 1
    h = {path: leaf for path, leaf in state.items() if "/h/" in path}
    m = {path: state[path.replace("/h/", "/m/")] for path in h}
    scaled = sum((np.abs(m[path]) < OPTIM.rho * h[path]).sum() for path in h)
    np.testing.assert_allclose(rates[-1], scaled / sum(leaf.size for leaf in h.values()), rtol=1e-6)
    assert metrics["loss"][-4:].mean() < 0.9 * metrics["loss"][:4].mean()


def drawn_by_numpy(logits: np.ndarray, step: int) -> np.ndarray:
    """The targets of update `step` + 1, from logits `[rows, T, V]`: the largest after the noise of the token's key."""
    rows, length, vocabulary = logits.shape
    keys = jax.random.split(step_key(SEED, jnp.int32(step), TARGETS), rows * length)
    noise = jnp.stack([jax.random.gumbel(key, (vocabulary,), "float64") for key in keys])
    return (logits + np.asarray(noise).reshape(logits.shape)).argmax(-1)


def gradients_of(model: Any, batch: dict[str, np.ndarray], targets: np.ndarray) -> dict[str, np.ndarray]:
    """Those of the mean cross entropy over the trained tokens, clipped together."""
    model.zero_grad()
    logits = model(torch.tensor(batch["tokens"]).long()).logits
    kept = torch.tensor(batch["loss_mask"] > 0)
    torch.nn.functional.cross_entropy(logits[kept], torch.tensor(targets).long()[kept]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def torch_run(model: Any, batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The curvature after as many updates by the paper's equations; the model is trained."""
    m, h = ({name: np.zeros(p.shape) for name, p in model.named_parameters()} for _ in range(2))
    for step, batch in enumerate(batches):
        grads, drawn = gradients_of(model, batch, batch["targets"]), {}
        if step % EVERY == EVERY - 1:
            with torch.no_grad():
                logits = model(torch.tensor(batch["tokens"]).long()).logits.numpy()
            drawn = gradients_of(model, batch, drawn_by_numpy(logits, step))
        with torch.no_grad():
            for name, p in model.named_parameters():
                m[name] = OPTIM.b1 * m[name] + (1 - OPTIM.b1) * grads[name]
                ratio = np.minimum(1, np.abs(m[name]) / (OPTIM.rho * h[name] + 1e-15))
                decay = 0 if "norm" in name else OPTIM.weight_decay
                p.sub_(OPTIM.learning_rate * (torch.tensor(np.sign(m[name]) * ratio) + decay * p))
        for name, g in drawn.items():
            h[name] = OPTIM.b2 * h[name] + (1 - OPTIM.b2) * batch["loss_mask"].sum() * g**2
    return h


def test_the_curvature_is_that_of_torch(tmp_path):
    """Five updates, with the gradients of transformers' model for the labels of each draw."""
    batches = [padded_batch(seed) for seed in range(5)]
    with jax.enable_x64(True):
        made = program(llama(), micro_batches=2, **HOW)
        state = made.start()
        rounded = jax.tree.map(lambda p: p.astype(np.float32), state.params)
        state = state._replace(params=jax.tree.map(lambda p: p.astype(np.float64), rounded))
        model = transformers_model(llama(), rounded, tmp_path / "start").double()
        seen = []
        for batch in batches:
            state, _ = made.compiled.run(state, made.place(batch, 2))
            seen.append(np.asarray(optax.tree.get(state.opt_state, "h")["head"]["kernel"]))
        curvature = torch_run(model, batches)
        assert not seen[0].any()
        assert [bool((a == b).all()) for a, b in pairwise(seen)] == [False, True, False, True]
        trained = {name: p.detach().numpy() for name, p in model.named_parameters()}
        for name, ours, theirs in (
            ("params", state.params, trained),
            ("h", optax.tree.get(state.opt_state, "h"), curvature),
        ):
            save_hf(small_lm(llama()), jax.tree.map(lambda p: p.astype(np.float32), ours), tmp_path / name)
            written = load_file(tmp_path / name / "model.safetensors")
            assert written.keys() == theirs.keys()
            # transformers computes norms and angles in float32; one sign that flips is 1e-3 of the largest weight.
            misses = {key: np.abs(written[key] - t).max() / np.abs(t).max() for key, t in theirs.items()}
            assert {key: miss for key, miss in misses.items() if not miss <= 1e-4} == {}, name


def test_a_curvature_that_is_not_finite_changes_nothing(monkeypatch):
    def not_finite(batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        return {**with_drawn_targets(batch, key), "loss_mask": jnp.full_like(batch["loss_mask"], jnp.nan)}

    monkeypatch.setattr("jaxllm.step.at_once.with_drawn_targets", not_finite)
    made = program(llama(), optimizer=OPTIM, curvature=CURVATURE)
    state, metrics = made.compiled.run(made.start(), made.place(ragged_batch(0)))
    assert metrics["bad"] == 0
    before = jax.tree.map(np.array, state)
    after, metrics = made.compiled.run(state, made.place(ragged_batch(1)))
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["bad"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)
