"""Stochastic rounding of bfloat16 parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import tree
from jaxllm.optim.build import Lomo
from jaxllm.optim.schedule_config import Constant
from jaxllm.step.rounding import apply_updates, stochastic_round
from tests.support.small_runs import llama, program, ragged_batch


def test_to_one_of_the_neighbours_and_right_on_average():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=512) * 10.0 ** rng.integers(-30, 30, 512), jnp.float32)
    draws = 4000
    rounded = jax.vmap(lambda key: stochastic_round(x, key))(jax.random.split(jax.random.key(0), draws))
    values = np.asarray(rounded, np.float64)
    bits = np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint32))
    towards_zero = (bits & 0xFFFF0000).view(np.float32).astype(np.float64)
    away = ((bits & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
    assert ((values == towards_zero) | (values == away)).all()
    error = (values.mean(0) - np.asarray(x, np.float64)) / (away - towards_zero)
    assert np.abs(error).max() < 5 * 0.5 / np.sqrt(draws)  # five standard deviations of the fairest coin


def test_what_is_exact_or_not_finite_stays():
    exact = jnp.asarray([0.0, -0.0, 1.0, -3.5, 2.0**-130, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    rounded = stochastic_round(exact, jax.random.key(3))
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), exact)


def test_other_dtypes_are_rounded_to_nearest():
    params = {"a": jnp.ones(3), "layers": {"b": jnp.ones((2, 3), jnp.float16)}}
    updates = {"a": jnp.full(3, 1e-4), "layers": {"b": jnp.full((2, 3), 1e-4)}}
    new = apply_updates(params, updates, jax.random.key(0))
    np.testing.assert_array_equal(new["a"], jnp.ones(3) + jnp.full(3, 1e-4))
    np.testing.assert_array_equal(new["layers"]["b"], 1)


def test_layers_leaves_and_steps_draw_separately():
    params = {"layers": {name: jnp.ones((2, 64, 64), jnp.bfloat16) for name in "ab"}}
    updates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0**-8, jnp.float32), params)
    draws = [apply_updates(params, updates, jax.random.key(step))["layers"] for step in (0, 1)]
    masks = [np.asarray(drawn[name][i], float) for drawn in draws for name in "ab" for i in (0, 1)]
    same = [(a == b).mean() for n, a in enumerate(masks) for b in masks[:n]]
    assert 0.4 < min(same) < max(same) < 0.6


def test_updates_below_half_a_unit_count():
    """2⁻¹⁰ of a parameter is lost to rounding each time; at random it moves the sum as far as it should."""
    slow = Lomo(type="lomo", learning_rate=2.0**-10, weight_decay=1.0, schedule=Constant(type="constant", warmup=0))
    batch = ragged_batch(0)
    batch["loss_mask"][:] = 0  # no gradient: the decay alone moves the parameters
    sums = {}
    for at_random in (False, True):
        made = program(llama(), optimizer=slow, dtype="bfloat16", stochastic_rounding=at_random, max_grad_norm=None)
        state = made.start()
        before = tree.flatten(state.params)["layers/mlp/up/kernel"].astype(jnp.float32)
        for _ in range(4):
            state, _ = made.compiled.run(state, made.place(batch))
        after = tree.flatten(state.params)["layers/mlp/up/kernel"].astype(jnp.float32)
        sums[at_random] = float(jnp.sum(after * before) / jnp.sum(before * before))
    assert sums[False] == 1.0
    np.testing.assert_allclose(1 - sums[True], 4 * 2.0**-10, rtol=0.15)
