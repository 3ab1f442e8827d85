"""Gradient clipping as LOMO does it: each entry first, then all gradients by their common norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clip_coefficient(norm: jax.Array, max_norm: float, eps: float = 1e-6) -> jax.Array:
    """`min(1, max_norm / (norm + eps))`, `norm` being the Euclidean one over all leaves together."""
    return jnp.minimum(1.0, max_norm / (norm + eps))


def clip_by_value_and_norm(
    max_norm: float | None = None, max_value: float | None = None
) -> optax.GradientTransformation:
    """Clamps each entry to `±max_value`, then multiplies by the coefficient of the *unclamped* gradients.

    Either limit may be None. The norm couples all leaves, so this stands before `per_layer`, never inside it.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        clipped: Any = updates
        if max_value is not None:
            clipped = optax.tree.clip(updates, -max_value, max_value)
        if max_norm is not None:
            coefficient = clip_coefficient(jnp.asarray(optax.tree.norm(updates)), max_norm)
            clipped = jax.tree.map(lambda g: g * coefficient, clipped)
        return clipped, state

    return optax.GradientTransformation(optax.init_empty_state, update)
