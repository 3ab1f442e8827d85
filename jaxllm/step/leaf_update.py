"""An optimizer applied to some leaves of a model at a time, of all layers or of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.step.norms import squares
from jaxllm.step.rounding import apply_updates

Leaves = dict[str, Any]
"""By the path of a parameter: it, its gradient, or a tuple of what the optimizer keeps about it."""


@dataclass(frozen=True)
class Visitor:
    """An update of some leaves, if their gradients are finite and `good`.

    coefficient: that they are scaled by, if any. max_grad_value: that they are clamped to. rounding: see
    `apply_updates`.
    """

    update: "LeafUpdate"
    good: jax.Array
    coefficient: jax.Array | None
    max_grad_value: float | None
    rounding: jax.Array | None

    def __call__(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        slots: Mapping[str, Any],
        common: list[Any],
        layers: jax.Array | None = None,
    ) -> tuple[Leaves, Leaves, list[Any]]:
        """The arguments and results of `LeafUpdate`."""
        fine = self.good & jnp.isfinite(sum(squares(grads).values()))
        grads = jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), dict(grads))
        if self.max_grad_value is not None:
            grads = optax.tree.clip(grads, -self.max_grad_value, self.max_grad_value)
        if self.coefficient is not None:
            grads = optax.tree.scale(self.coefficient, grads)
        new = self.update(params, grads, slots, common, self.rounding, layers)
        return jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, (dict(params), dict(slots), common))


class LeafUpdate:
    """An optimizer applied to some leaves of a model at a time.

    optax's state is taken apart into what belongs to each parameter and what is common to all (step counts).
    """

    def __init__(self, lm: LM, tx: optax.GradientTransformationExtraArgs) -> None:
        self._paths = tree.paths(lm.abstract())
        self._tx = tx

    def nested(self, leaves: Mapping[str, Any]) -> Params:
        """The parameter tree that has `leaves`, and None elsewhere."""
        return jax.tree.map(leaves.get, self._paths)

    def split(self, params: Params, opt_state: optax.OptState) -> tuple[Leaves, list[Any]]:
        """`({path: (its leaves of the state, …)}, the common leaves)` of the state for `params`."""
        owners = self._owners(params)
        slots: Leaves = dict.fromkeys(tree.flatten(params), ())
        common = []
        for owner, leaf in zip(jax.tree.leaves(owners), jax.tree.leaves(opt_state), strict=True):
            if owner == _COMMON:
                common.append(leaf)
            else:
                slots[owner] += (leaf,)
        return slots, common

    def join(self, params: Params, slots: Mapping[str, Any], common: list[Any]) -> optax.OptState:
        """The inverse of `split`."""
        left = {_COMMON: iter(common), **{name: iter(leaves) for name, leaves in slots.items()}}
        return jax.tree.map(lambda owner: next(left[owner]), self._owners(params))

    def __call__(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        slots: Mapping[str, Any],
        common: list[Any],
        rounding: jax.Array | None = None,
        layers: jax.Array | None = None,
    ) -> tuple[Leaves, Leaves, list[Any]]:
        """The updated leaves, and what the state is after the update. rounding, layers: of `apply_updates`."""
        nested = self.nested(params)
        updates, opt_state = self._tx.update(self.nested(grads), self.join(nested, slots, common), nested)
        return tree.flatten(apply_updates(nested, updates, rounding, layers)), *self.split(nested, opt_state)

    def _owners(self, params: Params) -> Any:
        """A tree like the state for `params`: at each leaf the path of the parameter that it belongs to."""
        shapes = jax.eval_shape(self._tx.init, params)
        return optax.tree.map_params(
            self._tx, lambda _, path: path, shapes, tree.paths(params), transform_non_params=lambda _: _COMMON
        )


_COMMON = ""
