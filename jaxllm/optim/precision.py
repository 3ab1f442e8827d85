"""Optimizer arithmetic and state in float32, whatever the dtype of the parameters and the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def at_least_float32(tree: Any) -> Any:
    """`tree` with every leaf in the wider of its own dtype and float32 (float64 stays float64)."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)), tree)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state, its arithmetic and the updates it returns in at least float32.

    optax creates state in the dtype of the parameters; a bfloat16 second moment stalls, because an increment
    below half a unit in the last place is lost. Float32 updates also mean that `optax.apply_updates` rounds
    once, when it casts the sum of parameter and update back to the parameter's dtype. Extra arguments of
    `update` are passed on as they are.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(at_least_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(at_least_float32(updates), state, at_least_float32(params), **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
