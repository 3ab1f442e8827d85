"""`per_layer` beyond the table of optimizers: several stacks, nesting, extra arguments, refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import optim
from jaxllm.core.errors import UserError
from jaxllm.optim.wrappers import per_layer


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def first_update(tx, grads, params, **extra):
    return jax.jit(lambda g, p, extra: tx.update(g, tx.init(p), p, **extra)[0])(grads, params, extra)


def by_rms() -> optax.GradientTransformation:
    """Each leaf over its RMS: the simplest transform that mixes what is in a leaf."""
    return optax.stateless_with_tree_map(lambda g, p: g / jnp.sqrt(jnp.mean(g**2)))


def over_rms(x, axis):
    return x / np.sqrt(np.mean(np.square(x), axis=axis, keepdims=True))


def test_stacks_of_several_lengths_stand_side_by_side() -> None:
    grads = {
        "head": normal(0, 4, 3),
        "layers": {"dense": {"kernel": normal(1, 2, 4, 3)}, "experts": {"kernel": normal(2, 5, 4, 3)}},
    }
    updates = first_update(per_layer(by_rms()), grads, grads)
    expected = {
        "head": over_rms(grads["head"], None),
        "layers": jax.tree.map(lambda g: over_rms(g, (1, 2)), grads["layers"]),
    }
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_nested_once_more_for_experts() -> None:
    grads = {"layers": {"experts": {"kernel": normal(0, 2, 3, 4, 5)}, "router": {"kernel": normal(1, 2, 4, 3)}}}
    tx = per_layer(per_layer(by_rms(), stacked=("layers/experts/*",)))
    updates = first_update(tx, grads, grads)["layers"]
    chex.assert_trees_all_close(
        updates["experts"]["kernel"], over_rms(grads["layers"]["experts"]["kernel"], (2, 3)), rtol=1e-6
    )
    chex.assert_trees_all_close(
        updates["router"]["kernel"], over_rms(grads["layers"]["router"]["kernel"], (1, 2)), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adan", "lomo", "sophia_g"])
def test_element_wise_optimizers_are_unchanged(name: str) -> None:
    """The same state, scalar counts included, and the same updates, Hessian gradients included."""
    params = {"embed": normal(0, 4, 3), "layers": {"q": {"kernel": normal(1, 2, 4, 3)}}}
    grads = jax.tree.map(jnp.cos, params)
    tx = getattr(optim, name)(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    extra = {"hessian_grads": jax.tree.map(jnp.sin, params)} if name == "sophia_g" else {}

    @jax.jit
    def two_steps(grads, params, extra):
        results = []
        for form in (tx, per_layer(tx)):
            state = form.init(params)
            _, state = form.update(grads, state, params, **extra)
            results.append(form.update(grads, state, params, **extra))
        return results

    plain, wrapped = two_steps(grads, params, extra)
    # Float32 sums may be fused in another order, hence not bit for bit.
    chex.assert_trees_all_close(plain, wrapped, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, wrapped)


def test_no_dimension_is_moved_or_reshaped() -> None:
    """What would make the partitioner gather a sharded stack is absent from the program."""
    params = {"layers": {"q": {"kernel": normal(0, 2, 4, 3)}}}
    tx = per_layer(optim.adalomo(0.1))
    state = jax.eval_shape(tx.init, params)
    program = str(jax.make_jaxpr(tx.update)(params, state, params))
    assert "rsqrt" in program
    assert "transpose" not in program
    assert "gather" not in program


def test_a_transform_with_one_number_for_all_leaves_is_refused() -> None:
    params = {"embed": normal(0, 4, 3), "layers": {"q": {"kernel": normal(1, 2, 4, 3)}}}
    with pytest.raises(ValueError, match="vmap"):
        first_update(per_layer(optax.contrib.prodigy(1.0)), params, params)


def test_a_scalar_is_no_stack() -> None:
    with pytest.raises(UserError, match="'layers/scale' is a scalar"):
        per_layer(by_rms()).init({"layers": {"scale": jnp.ones(())}})
