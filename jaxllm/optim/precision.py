"""Optimizer arithmetic and state in at least float32, whatever the dtype of the parameters and the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def at_least_float32(tree: Any) -> Any:
    """`tree` with every leaf in the wider of its own dtype and float32 (float64 stays float64)."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)), tree)


def in_float32(
    tx: optax.GradientTransformation, *, complex_leaves: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state and its arithmetic in at least float32.

    optax creates state in the dtype of the parameters; a bfloat16 second moment stalls, because an increment
    below half a unit in the last place is lost. The updates have the dtype of the gradients, as optax's have: wrappers
    that choose between an update and none, such as `optax.apply_if_finite`, need that. With float32 gradients of
    bfloat16 parameters `optax.apply_updates` rounds once, when it casts the sum of parameter and update. Extra
    arguments of `update` are passed on as they are.

    complex_leaves: whether `tx` is right for complex parameters. Otherwise `init` and `update` raise ValueError, which
    names the leaf.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        check(params)
        return inner.init(at_least_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        check(updates)
        new, state = inner.update(at_least_float32(updates), state, at_least_float32(params), **extra_args)
        return jax.tree.map(lambda u, g: jnp.asarray(u, jnp.asarray(g).dtype), new, updates), state

    def check(leaves: Any) -> None:
        if not complex_leaves:
            jax.tree_util.tree_map_with_path(_refuse_complex, leaves)

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_complex(path: Any, leaf: Any) -> None:
    if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.complexfloating):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
            f"the parameter {name!r} is {jnp.asarray(leaf).dtype}, and this optimizer is defined for real numbers; "
            "give its real and imaginary parts as two parameters"
        )
