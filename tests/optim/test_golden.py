"""Trajectories of the original implementations: 20 steps of three parameters under recorded gradients.

Tolerances: an independent float64 re-derivation of the rules agrees with these float32 files to
3e-6·(|value| + 0.01); atol 5e-6 and rtol 1e-5 leave room for a second float32 rounding over 20 steps. With
bfloat16 parameters a step that starts from the recorded parameters may differ by one unit in the last place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxllm.optim.clip import clip_coefficient
from jaxllm.optim.sophia_g import win_rate

BOUND = {"atol": 5e-6, "rtol": 1e-5}
CASES = (
    *("adamw_A1", "adamw_A2", "lion_A1", "lion_A2", "adan_A1", "adan_A2", "adan_A3"),
    *("sophiag_A1", "sophiag_A2", "adalomo_A1", "adalomo_A2_wd", "adalomo_A3_clipnorm"),
    *("lomo_A1_noclip", "lomo_A2_noclip_wd_value", "lomo_A3_clip", "lomo_A4_clip_wd"),
)
BF16_CASES = ("lomo_A5_bf16_noclip", "adalomo_A4_bf16")
# The reference's state name → ours, where they differ.
STATE_NAMES = {
    "adamw": {"m": "mu", "v": "nu"},
    "lion": {"m": "mu"},
    "adan": {"neg_prev_grad": "prev_grad"},
    "adalomo": {"v": "v_row"},
}


def run(recorded):
    """The parameters and states after every step, and Sophia's win rate, in one compiled scan."""
    tx = recorded.tx
    is_sophia = recorded.optimizer == "sophiag"
    moves, hessian_grads = recorded.hessian_gradients() if is_sophia else (np.zeros(20, bool), None)

    def step(carry, inputs):
        params, state = carry
        grads, moved, hessian = inputs
        updates, after = tx.update(grads, state, params)
        share = win_rate(after, recorded.hyper["rho"], recorded.hyper["bs"]) if is_sophia else jnp.nan
        if is_sophia:
            _, with_hessian = tx.update(grads, state, params, hessian_grads=hessian)
            after = jax.tree.map(lambda a, b: jnp.where(moved, a, b), with_hessian, after)
        params = optax.apply_updates(params, updates)
        return (params, after), (params, after, share)

    @jax.jit
    def trajectory(params, inputs):
        return jax.lax.scan(step, (params, tx.init(params)), inputs)[1]

    return trajectory(recorded.tree("init"), (recorded.tree("grads"), moves, hessian_grads))


def assert_states_close(recorded, states: optax.OptState) -> None:
    for moment, index in (("step1", 0), ("step20", 19)):
        for name, expected in recorded.states(moment).items():
            ours = optax.tree.get(states, STATE_NAMES.get(recorded.optimizer, {}).get(name, name))
            sign = -1 if name.startswith("neg_") else 1
            for parameter, value in expected.items():
                assert ours[parameter].dtype == jnp.float32
                np.testing.assert_allclose(
                    sign * ours[parameter][index],
                    value,
                    **BOUND,
                    err_msg=f"{name}/{parameter} {moment}",
                )


@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_the_original(case: str, golden) -> None:
    recorded = golden(case)
    params, states, shares = run(recorded)
    for name, expected in recorded.tree("params").items():
        np.testing.assert_allclose(params[name], expected, **BOUND, err_msg=name)
    assert_states_close(recorded, states)
    if "win_rate" in recorded.arrays:  # a share of 400 entries; the comparison of one may round differently
        np.testing.assert_allclose(shares, recorded.arrays["win_rate"], atol=1 / 400)


@pytest.mark.parametrize("case", BF16_CASES)
def test_bfloat16_step_is_within_one_ulp_of_the_original(case: str, golden) -> None:
    recorded = golden(case)
    bf16 = ml_dtypes.bfloat16
    after = {name: value.astype(bf16) for name, value in recorded.tree("params").items()}
    before = {
        name: np.concatenate([init[None].astype(bf16), after[name][:-1]])
        for name, init in recorded.tree("init").items()
    }
    # Of bfloat16's precision, and float32 as the training step gives them, so that the sum alone is rounded.
    grads = {name: value.astype(bf16).astype(np.float32) for name, value in recorded.tree("grads").items()}

    def step(state, inputs):
        params, grads = inputs
        updates, state = recorded.tx.update(grads, state, params)
        return state, (optax.apply_updates(params, updates), state)

    first = {name: value[0] for name, value in before.items()}
    _, (params, states) = jax.jit(lambda first, inputs: jax.lax.scan(step, recorded.tx.init(first), inputs))(
        first, (before, grads)
    )
    for name, expected in after.items():
        assert params[name].dtype == bf16
        ulps = np.abs(_ordered(np.asarray(params[name])) - _ordered(expected))
        assert ulps.max() <= 1, name
        # Where sums round alike the values are equal; a single ulp everywhere would be a wrong rounding.
        assert (ulps == 0).mean() > 0.99, name
    assert_states_close(recorded, states)


def _ordered(x: np.ndarray) -> np.ndarray:
    """bfloat16 values as integers in the same order, neighbours one apart."""
    bits = x.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -32768 - bits, bits)


@pytest.mark.parametrize("case", ["lomo_A3_clip", "lomo_A4_clip_wd", "adalomo_A3_clipnorm"])
def test_clip_coefficient_equals_the_original(case: str, golden) -> None:
    recorded = golden(case)
    grads, limit = recorded.tree("grads"), recorded.hyper["clip_grad_norm"]
    np.testing.assert_allclose(jax.vmap(optax.tree.norm)(grads), recorded.arrays["grad_norm"], rtol=1e-6)
    coefficients = jax.vmap(lambda g: clip_coefficient(optax.tree.norm(g), limit))(grads)
    np.testing.assert_allclose(coefficients, recorded.arrays["clip_coef"], rtol=1e-6)


def test_every_recorded_run_is_compared(golden_folder: Path) -> None:
    assert {file.stem for file in golden_folder.glob("*.npz")} == {*CASES, *BF16_CASES}
