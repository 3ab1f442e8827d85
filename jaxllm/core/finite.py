"""Whether weights are numbers that a model can compute with."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError

ANOTHER = "Take an earlier checkpoint, or another copy of the weights"
"""What helps where weights that were read are not finite."""


def check_finite(params: Any, what: str, remedy: str) -> None:
    """Raises UserError if a leaf of `params` has NaN, infinity, or numbers whose squares overflow.

    The sum of squares of a leaf is taken in at least float32, so 1.8e19 is the largest magnitude. Weights above it are
    no better than infinity: the norm of what they make is infinite, and its inverse 0, so that a model gives constant
    logits and a finite loss. Every process must call it. what, remedy: the beginning and end of the message.
    """
    floats = {path: leaf for path, leaf in tree.flatten(params).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    wrong = [path for path, sound in _are_sound(floats).items() if not sound]
    if wrong:
        more = f", and so have {len(wrong) - 1} more parameters" if wrong[1:] else ""
        raise UserError(
            f"{what}: {wrong[0]} has numbers that are NaN, infinite or so large that their squares are{more}. {remedy}"
        )


@jax.jit
def _are_sound(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def is_sound(leaf: jax.Array) -> jax.Array:
        return jnp.isfinite(jnp.sum(jnp.square(leaf.astype(at_least_float32(leaf.dtype)))))

    return jax.tree.map(is_sound, leaves)
