"""The gradients of a batch as one tree, and one update of all that trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import CROSS_ENTROPY, Losses, Objective
from jaxllm.optim.clip import clip_coefficient
from jaxllm.optim.curvature import Curvature
from jaxllm.step.batch import TARGETS, Batch, step_key, with_drawn_targets
from jaxllm.step.by_layer import update_by_layer
from jaxllm.step.gradient import Gradient
from jaxllm.step.layer_states import LayerStates
from jaxllm.step.leaf_update import GuardedUpdate, LeafUpdate, Limits
from jaxllm.step.norms import squares
from jaxllm.step.offload import in_pieces
from jaxllm.step.reduction import scattered_tree
from jaxllm.step.rounding import apply_updates
from jaxllm.step.selection import put_active, take_active
from jaxllm.step.state import Metrics, TrainState


@dataclass(frozen=True)
class AtOnce:
    """The backward pass of `gradient`, before one update.

    by_layer: one layer is updated after the other, see `by_layer`; the optimizer must then treat leaves separately, and
    also the layers of a stack. scattered: each replica has a part of the gradient and of the state.

    curvature: when the optimizer (then `optim.sophia_g`) is given √N·ĝ as `hessian_grads`. ĝ is the gradient `plain`
    (None = `gradient`) at the same parameters, of the same N trained tokens with targets drawn by `seed`, clipped to
    `max_grad_norm` by itself. One that is not finite makes the step bad.
    """

    gradient: Gradient
    plain: Gradient | None = None
    curvature: Curvature | None = None
    by_layer: bool = False
    scattered: bool = False
    seed: int = 0
    max_grad_norm: float | None = None
    knows_norm: bool = True

    def __call__(
        self, lm: LM, tx: Any, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> "Tree":
        losses, grads = unscaled(self.gradient, lm, state, batch, objective, rows)
        return Tree(self, lm, tx, state, batch, rows, losses, grads)


def unscaled(
    gradient: Gradient, lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
) -> tuple[Losses, Params]:
    """What `gradient` gives, divided by the loss scale where the state has one."""
    losses, grads = gradient(lm, state, batch, objective, rows)
    if state.loss_scale is not None:
        wide = jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), grads)
        grads = optax.tree.scale(1 / state.loss_scale.scale, wide)
    return losses, grads


@dataclass(frozen=True)
class Tree:
    """See `backward.Back`. grads: of what trains, the layers as `[n, …]` where some of them do."""

    how: AtOnce
    lm: LM
    tx: Any
    state: TrainState
    batch: Batch
    rows: jax.Array | None
    losses: Losses
    grads: Params

    def squares(self) -> Mapping[str, jax.Array]:
        return self._squares

    @cached_property
    def _squares(self) -> Mapping[str, jax.Array]:
        return squares(self.grads)

    @property
    def finite(self) -> jax.Array | bool:
        return True if self.how.curvature is None else jnp.isfinite(self._drawn[1])

    def apply(self, limits: Limits) -> tuple[Params, optax.OptState, Mapping[str, jax.Array], Metrics]:
        curvature, params = self.how.curvature, take_active(self.state.params, self.rows)

        def updated(opt_state: optax.OptState) -> tuple[optax.OptState, tuple[Params, Metrics]]:
            if self.how.by_layer:
                visitor = GuardedUpdate(LeafUpdate(self.lm, self.tx), limits)
                args = (self.lm, params, self.grads, opt_state)
                new, after = update_by_layer(visitor, *args, scattered=self.how.scattered)
                return after, (new, {})
            updates, after = self._updates(limits, params, opt_state)
            made = (apply_updates(params, updates, limits.rounding, self._rounded_layers(limits)), after)
            new, after = jax.tree.map(lambda new, old: jnp.where(limits.good, new, old), made, (params, opt_state))
            if curvature is None:
                return after, (new, {})
            return after, (new, {"sophia_win_rate": curvature.win_rate(after, new, self.lm.padded)})

        opt_state, (new, of_update) = in_pieces(updated, self.state.opt_state)
        return put_active(self.state.params, new, self.rows), opt_state, self._squares, of_update

    def _rounded_layers(self, limits: Limits) -> jax.Array | None:
        """Which layers the leaves of the layers are, by which their bits are drawn."""
        if limits.rounding is None:
            return None
        order = jnp.asarray(self.lm.layer_order)
        return order if self.rows is None else order[self.rows]

    def _updates(self, limits: Limits, params: Params, opt_state: Any) -> tuple[optax.Updates, Any]:
        """The updates, and the state of the optimizer after them."""
        grads, step = limits.of(self.grads), self.state.step
        if isinstance(self.tx, LayerStates):
            assert self.rows is not None, "an optimizer with a state for each layer needs the layers that train"
            return self.tx.update(grads, opt_state, params, step, self.rows)
        updates, after = self.tx.update(grads, opt_state, params)
        if (curvature := self.how.curvature) is None:
            return updates, after
        drawn, norm = self._drawn
        by_itself = None if self.how.max_grad_norm is None else clip_coefficient(norm, self.how.max_grad_norm)
        root = jnp.sqrt(jnp.sum(self.batch["loss_mask"])).astype(norm.dtype)
        hessian_grads = optax.tree.scale(root, limits._replace(coefficient=by_itself).of(drawn))
        due = curvature.is_due(step)
        _, moved = self.tx.update(grads, opt_state, params, hessian_grads=hessian_grads)
        return updates, jax.tree.map(lambda moved, kept: jnp.where(due, moved, kept), moved, after)

    @cached_property
    def _drawn(self) -> tuple[Params, jax.Array]:
        """ĝ before it is clipped, and its norm, in the steps in which it is due; zeros in others."""
        assert self.how.curvature is not None

        def drawn() -> tuple[Params, jax.Array]:
            batch = with_drawn_targets(self.batch, step_key(self.how.seed, self.state.step, TARGETS))
            _, grads = unscaled(self.how.plain or self.how.gradient, self.lm, self.state, batch, CROSS_ENTROPY, None)
            # XLA does not see how the result of a condition is used, and would leave it whole on each device.
            shardings = tree.flatten(self.lm.shardings())

            def laid_out(path: str, g: jax.Array) -> jax.Array:
                return jax.lax.with_sharding_constraint(g, shardings[path])

            grads = scattered_tree(grads, self.lm) if self.how.scattered else tree.map_with_path(laid_out, grads)
            return grads, jnp.sqrt(sum(squares(grads).values()))

        # What the condition gives is kept beside the gradient, so it is scaled, and made wider, behind it.
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(drawn))
        return jax.lax.cond(self.how.curvature.is_due(self.state.step), drawn, lambda: nothing)
