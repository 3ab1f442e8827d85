"""An optimizer applied to some leaves of a model at a time, of all layers or of one."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Leaves, Params
from jaxllm.models.lm import LM
from jaxllm.step.norms import squares
from jaxllm.step.rounding import apply_updates
from jaxllm.step.state import map_params


class Limits(NamedTuple):
    """What an update is made under. good: whether it is made at all. coefficient: what gradients are scaled by, if
    anything. max_grad_value: what they are clamped to before. rounding: see `apply_updates`."""

    good: jax.Array
    coefficient: jax.Array | None
    max_grad_value: float | None
    rounding: jax.Array | None

    def of(self, grads: Any) -> Any:
        """`grads`, clamped and scaled, in at least float32."""
        grads = jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), grads)
        if self.max_grad_value is not None:
            grads = optax.tree.clip(grads, -self.max_grad_value, self.max_grad_value)
        return grads if self.coefficient is None else optax.tree.scale(self.coefficient, grads)


@dataclass(frozen=True)
class GuardedUpdate:
    """An update of some leaves under `limits`, if their own gradients are finite too."""

    update: "LeafUpdate"
    limits: Limits

    def __call__(
        self,
        params: Leaves,
        grads: Leaves,
        slots: Leaves,
        common: list[Any],
        layers: jax.Array | None = None,
    ) -> tuple[Leaves, Leaves, list[Any]]:
        """The arguments and results of `LeafUpdate`."""
        fine = self.limits.good & jnp.isfinite(sum(squares(grads).values()))
        new = self.update(params, self.limits.of(dict(grads)), slots, common, self.limits.rounding, layers)
        return jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, (dict(params), dict(slots), common))


class LeafUpdate:
    """An optimizer applied to some leaves of a model at a time.

    optax's state is taken apart into what belongs to each parameter and what is common to all (step counts).
    """

    def __init__(self, lm: LM, tx: optax.GradientTransformationExtraArgs) -> None:
        self._paths = tree.paths(lm.abstract())
        self._tx = tx

    def nested(self, leaves: Leaves) -> Params:
        """The parameter tree that has `leaves`, and None elsewhere."""
        return jax.tree.map(leaves.get, self._paths)

    def split(self, params: Params, opt_state: optax.OptState) -> tuple[Leaves, list[Any]]:
        """`({path: (its leaves of the state, …)}, the common leaves)` of the state for `params`."""
        owners = self._owners(params)
        slots: dict[str, Any] = dict.fromkeys(tree.flatten(params), ())
        common = []
        for owner, leaf in zip(jax.tree.leaves(owners), jax.tree.leaves(opt_state), strict=True):
            if owner == _COMMON:
                common.append(leaf)
            else:
                slots[owner] += (leaf,)
        return slots, common

    def join(self, params: Params, slots: Leaves, common: list[Any]) -> optax.OptState:
        """The inverse of `split`."""
        left = {_COMMON: iter(common), **{name: iter(leaves) for name, leaves in slots.items()}}
        return jax.tree.map(lambda owner: next(left[owner]), self._owners(params))

    def __call__(
        self,
        params: Leaves,
        grads: Leaves,
        slots: Leaves,
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
        return map_params(self._tx, lambda _, param, path: path, shapes, params, lambda _: _COMMON)


_COMMON = ""
