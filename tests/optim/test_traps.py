"""Where well-known implementations do not compute what the papers' own code does, and ours does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import optim
from jaxllm.optim.sophia_g import win_rate
from jaxllm.optim.wrappers import per_layer


def share_of_movement(recorded, tx, extra=lambda step: {}) -> float:
    """How far `tx` ends from the recorded parameters, as a share of how far they moved in 20 steps.

    The smallest over the parameters; of each the largest entries are compared.
    """
    params, grads = recorded.tree("init"), recorded.tree("grads")
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(20):
        updates, state = update(jax.tree.map(lambda g, i=i: g[i], grads), state, params, **extra(i))
        params = optax.apply_updates(params, updates)
    ends = recorded.tree("params")

    def share(end, initial, value):
        return np.abs(value - end[-1]).max() / np.abs(end[-1] - initial).max()

    return min(jax.tree.leaves(jax.tree.map(share, ends, recorded.tree("init"), params)))


def test_optax_adan_weighs_the_gradient_difference_wrongly_and_ours_does_not(golden) -> None:
    recorded = golden("adan_A1")
    hyper = recorded.hyper
    betas = {name: hyper[name] for name in ("b1", "b2", "b3", "eps")}
    theirs = optax.adan(hyper["lr"], **betas, eps_root=0.0, weight_decay=0.0)
    assert share_of_movement(recorded, theirs) > 0.3
    assert share_of_movement(recorded, recorded.tx) < 1e-4


def test_optax_sophia_is_not_sophia_g(golden) -> None:
    recorded = golden("sophiag_A1")
    hyper, hessian_grads = recorded.hyper, recorded.tree("hess_grads")

    def estimator_update(updates, state, params=None, *, hessian, **_):
        return hessian, state

    # Given even the right estimate, bs·ĝ², in the update that follows the step in which the original takes it.
    theirs = optax.contrib.sophia(
        hyper["lr"],
        b1=hyper["b1"],
        b2=hyper["b2"],
        gamma=hyper["rho"],
        weight_decay=hyper["weight_decay"],
        update_interval=hyper["hessian_interval"],
        hessian_diagonal_fn=optax.GradientTransformationExtraArgs(optax.init_empty_state, estimator_update),
    )

    def extra(step: int):
        return {"hessian": jax.tree.map(lambda g: hyper["bs"] * g[step // 10] ** 2, hessian_grads)}

    assert share_of_movement(recorded, theirs, extra) > 0.25


def test_bfloat16_second_moment_stalls_in_optax_and_not_in_ours() -> None:
    """The squared gradient jumps from 1 to 4 at step 1000 of 2000; v follows only in float32."""
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}

    def second_moment_at_the_end(tx) -> float:
        def step(state, i):
            grads = {"w": jnp.full((2, 2), jnp.where(i < 1000, 1, 2), jnp.bfloat16)}
            return tx.update(grads, state, params)[1], None

        state = jax.jit(lambda: jax.lax.scan(step, tx.init(params), jnp.arange(2000))[0])()
        return float(optax.tree.get(state, "v_row")["w"][0])

    theirs = optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate=0.8)
    assert second_moment_at_the_end(theirs) == pytest.approx(2.0, abs=0.01)
    assert second_moment_at_the_end(optim.adalomo(0.0)) == pytest.approx(3.85, abs=0.01)


LAYERS, ROWS, COLUMNS = 2, 6, 4


def stacked_model(key: jax.Array):
    """Parameters with layers of very different size, and gradients of two steps."""
    keys = jax.random.split(key, 7)
    scales = jnp.array([0.01, 1.0])[:, None, None]
    params = {
        "embed": {"table": jax.random.normal(keys[0], (5, COLUMNS))},
        "layers": {
            "q": {
                "kernel": scales * jax.random.normal(keys[1], (LAYERS, ROWS, COLUMNS)),
                "bias": jax.random.normal(keys[2], (LAYERS, COLUMNS)),
            },
            "norm": {"scale": jnp.ones((LAYERS, ROWS))},
        },
    }
    leaves, structure = jax.tree.flatten(params)
    grads = [jax.random.normal(key, (2, *p.shape)) for key, p in zip(keys[3:], leaves, strict=True)]
    return params, jax.tree.unflatten(structure, grads)


def trained(tx, params, grads):
    """The parameters after one step per leading index of `grads`."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]


def test_adalomo_mixes_stacked_layers_and_per_layer_does_not() -> None:
    params, grads = stacked_model(jax.random.key(0))
    tx = optim.adalomo(0.1, weight_decay=0.1)
    # optax's form of AdaLomo takes the stack as it is.
    mixing = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_param_block_rms(1e-3),
        optax.scale_by_learning_rate(0.1),
    )

    @jax.jit
    def runs(params, grads):
        layers = [
            trained(
                tx,
                jax.tree.map(lambda p, i=i: p[i], params["layers"]),
                jax.tree.map(lambda g, i=i: g[:, i], grads["layers"]),
            )
            for i in range(LAYERS)
        ]
        one_by_one = {
            "embed": trained(tx, params["embed"], grads["embed"]),
            "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        }
        return one_by_one, trained(per_layer(tx), params, grads), trained(mixing, params, grads)

    one_by_one, ours, mixed = runs(params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, one_by_one)
    # The small layer moves as far as the large ones do.
    kernels = [tree["layers"]["q"]["kernel"][0] for tree in (params, one_by_one, mixed)]
    assert np.abs(kernels[2] - kernels[0]).max() > 7 * np.abs(kernels[1] - kernels[0]).max()


def test_adalomo_refuses_a_stack_of_matrices_by_name() -> None:
    params, _ = stacked_model(jax.random.key(0))
    with pytest.raises(ValueError, match=r"'layers/q/kernel' has shape \(2, 6, 4\).*per_layer"):
        optim.adalomo(0.1).init(params)


def test_zero_gradient_moves_a_parameter_and_a_mask_does_not() -> None:
    params = {"frozen": jnp.array([1.0, -2.0]), "free": jnp.array([3.0])}
    grads = {"frozen": jnp.array([[1.0, 1.0]] + [[0.0, 0.0]] * 5), "free": jnp.ones((6, 1))}
    tx = optim.adamw(1e-3, weight_decay=0.1)

    # Zeros are a gradient: momentum and decay keep moving the parameter after the first step.
    first = jax.tree.map(lambda g: g[:1], grads)
    after_one, after_six = jax.jit(lambda: (trained(tx, params, first), trained(tx, params, grads)))()
    assert (np.abs(after_six["frozen"] - after_one["frozen"]) > 1e-3).all()

    labels = {"frozen": "frozen", "free": "free"}
    masked = optax.partition({"free": tx, "frozen": optax.set_to_zero()}, labels)
    kept = jax.jit(lambda p, g: trained(masked, p, g))(params, grads)
    np.testing.assert_array_equal(kept["frozen"], params["frozen"])
    np.testing.assert_array_equal(kept["free"], after_six["free"])


def test_weight_decay_follows_the_mask() -> None:
    """Each optimizer, without gradient: what decays shrinks by 1 − rate·decay (·scale), the rest keeps its bits."""
    params = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([1.0, -1.0])}
    grads = jax.tree.map(lambda p: jnp.zeros((1, *p.shape)), params)
    mask = {"kernel": True, "bias": False}
    shrinks = {
        "adamw": 1 - 0.05,
        "lion": 1 - 0.05,
        "adan": 1 / (1 + 0.05),
        "sophia_g": 1 - 0.05,
        "lomo": 1 - 0.05,
        "adalomo": 1 - 0.05,  # the RMS of the kernel is 1
    }

    @jax.jit
    def runs(params, grads):
        return {
            name: trained(getattr(optim, name)(0.1, weight_decay=0.5, mask=mask), params, grads) for name in shrinks
        }

    for name, after in runs(params, grads).items():
        np.testing.assert_array_equal(after["bias"], params["bias"], err_msg=name)
        np.testing.assert_allclose(after["kernel"], shrinks[name] * params["kernel"], rtol=1e-6, err_msg=name)


def test_sophias_win_rate_of_more_entries_than_an_int32_counts() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32)}
    state = jax.eval_shape(optim.sophia_g(1e-3).init, params)
    rate = jax.eval_shape(lambda state: win_rate(state, 0.04, 1), state)
    assert (rate.shape, rate.dtype) == ((), jnp.float32)


def test_sophias_win_rate_counts_scalars() -> None:
    state = {"m": {"w": jnp.ones((2, 3)), "temperature": jnp.ones(())}, "h": {"w": jnp.zeros((2, 3))}}
    state["h"]["temperature"] = jnp.array(2.0)
    np.testing.assert_allclose(win_rate(state, rho=1.0, batch_tokens=1), 1 / 7, rtol=1e-6)
