"""The training step: gradients of the trainable half, clipping, the optimizer."""

from collections.abc import Callable, Mapping
from functools import partial
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
from jaxllm.step.batch import ROUNDING, TARGETS, Batch, step_key, with_drawn_targets, with_dropout
from jaxllm.step.by_layer import update_by_layer
from jaxllm.step.gradient import Gradient
from jaxllm.step.leaf_update import LeafUpdate, Visitor
from jaxllm.step.norms import norms, squares
from jaxllm.step.offload import in_pieces
from jaxllm.step.rounding import apply_updates
from jaxllm.step.state import SMALLEST_LOSS_SCALE, Metrics, Step, TrainState, over_replicas


def make_step(
    lm: LM,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    gradient: Gradient,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    seed: int = 0,
    stochastic_rounding: bool = False,
    curvature: Curvature | None = None,
    penalty: Callable[[Params], jax.Array] | None = None,
    by_layer: bool = False,
    scattered: bool = False,
) -> Step:
    """A step over batches of arrays `[micro-batches, sequences, T]`.

    The objective is the mean over all trained tokens of the whole batch, so that the result does not depend on how
    the batch is cut into micro-batches, nor on how `gradient` walks through them. With `max_grad_norm`, the
    gradient is scaled by min(1, max_grad_norm / (norm + 1e-6)), norm being that of all trainable parameters. With
    `max_grad_value`, its entries are clamped to ±max_grad_value before that (the norm is of the unclamped ones).
    A loss or gradient that is not finite leaves parameters, optimizer state and the schedule's step as they are. So do
    parameters whose norm is not finite: a model normalises what such weights make to 0, and its loss is finite.
    Optimizer state that lies in the host's memory is on the device while it is used, see `in_pieces`.

    seed: of what is drawn, anew for each step: what `lm.dropout` drops, a mask for each sequence, and how bfloat16
    parameters are rounded where `stochastic_rounding`.

    Where the state has a loss scale, the objective is multiplied by it before it is differentiated, and the float32
    gradient divided by it after. A gradient that is not finite then counts as an overflow of float16, and lowers the
    scale; it counts as bad only where the loss is not finite either or the scale is the smallest already.

    With `curvature`, `tx` (then `optim.sophia_g`) is given √N·ĝ as `hessian_grads` in the updates in which that is due:
    ĝ is the gradient at the same parameters, of the same N trained tokens with drawn targets, clipped by itself as the
    gradient is. One that is not finite makes the step bad.

    penalty: of the trainable parameters, added to the objective once a step; the curvature is that of the loss alone.

    by_layer: one layer is updated after the other, see `by_layer`; `tx` must then treat leaves separately, and also the
    layers of a stack, and there is no curvature. scattered: each replica has a part of the gradient and of the state.

    Metrics: `loss` (the mean cross entropy, whatever is minimised), `grad_norm` (before clipping), `learning_rate`,
    `trained_tokens`, `bad` (1 for a step that was not applied); `grad_norm/<group>` and `param_norm/<group>` (before
    the update) of the trainable half, see `norms.norms`; `objective` where it is not the loss, and its
    parts, such as `z_loss` and `penalty`; `loss_scale` (the one used) and `overflow` (1 for such a step) where there is
    one; `sophia_win_rate` with `curvature`: the share of entries that were not clipped.
    """

    def unscaled_gradient(state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        losses, grads = gradient(lm, state, batch, objective)
        if state.loss_scale is not None:
            grads = optax.tree.scale(1 / state.loss_scale.scale, wide(grads))
        return losses, grads

    def wide(grads: Params) -> Params:
        return jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), grads)

    def clips_by(norm: jax.Array) -> jax.Array | None:
        return None if max_grad_norm is None else clip_coefficient(norm, max_grad_norm)

    def clipped(grads: Params, norm: jax.Array) -> Params:
        grads = wide(grads)
        if max_grad_value is not None:
            grads = optax.tree.clip(grads, -max_grad_value, max_grad_value)
        if (coefficient := clips_by(norm)) is not None:
            grads = optax.tree.scale(coefficient, grads)
        return grads

    def rounds_by(state: TrainState) -> jax.Array | None:
        return step_key(seed, state.step, ROUNDING) if stochastic_rounding else None

    def curvature_gradient(state: TrainState, batch: Batch) -> tuple[Params, jax.Array]:
        """ĝ before it is clipped, and its norm."""
        batch = with_drawn_targets(batch, step_key(seed, state.step, TARGETS))
        _, grads = unscaled_gradient(state, batch, CROSS_ENTROPY)
        # XLA does not see how the result of a condition is used, and would leave it whole on each device.
        shardings = tree.flatten(lm.shardings())

        def laid_out(path: str, g: jax.Array) -> jax.Array:
            sharding = over_replicas(shardings[path], g.shape) if scattered else shardings[path]
            return jax.lax.with_sharding_constraint(g, sharding)

        grads = tree.map_with_path(laid_out, grads)
        return grads, jnp.sqrt(sum(squares(grads).values()))

    def curvature_if_due(state: TrainState, batch: Batch) -> tuple[Params | None, jax.Array | bool]:
        """√N·ĝ in the steps in which it is due, zeros in others, and whether it is finite; None where it never is."""
        if curvature is None:
            return None, True
        # What the condition gives is kept beside the gradient, so it is scaled, and made wider, behind it.
        drawn = partial(curvature_gradient, state, batch)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(drawn))
        grads, norm = jax.lax.cond(curvature.is_due(state.step), drawn, lambda: nothing)
        root = jnp.sqrt(jnp.sum(batch["loss_mask"])).astype(norm.dtype)
        return optax.tree.scale(root, clipped(grads, norm)), jnp.isfinite(norm)

    def updates_of(
        state: TrainState, grads: Params, hessian_grads: Params | None
    ) -> tuple[optax.Updates, optax.OptState]:
        """The updates, and the state of the optimizer after them."""
        updates, after = tx.update(grads, state.opt_state, state.params)
        if curvature is None:
            return updates, after
        due = curvature.is_due(state.step)
        _, moved = tx.update(grads, state.opt_state, state.params, hessian_grads=hessian_grads)
        return updates, jax.tree.map(lambda moved, kept: jnp.where(due, moved, kept), moved, after)

    def applied(state: TrainState, updates: optax.Updates) -> Params:
        if (key := rounds_by(state)) is None:
            return apply_updates(state.params, updates)
        return apply_updates(state.params, updates, key, jnp.asarray(lm.layer_order))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = with_dropout(lm, batch, seed, state.step)
        losses, grads = unscaled_gradient(state, batch, objective)
        penalties = {}
        if penalty is not None:
            penalties["penalty"], of_penalty = jax.value_and_grad(penalty)(state.params)
            losses = losses._replace(objective=losses.objective + penalties["penalty"])
            penalties["objective"] = losses.objective
            grads = jax.tree.map(jnp.add, wide(grads), of_penalty)
        loss_scale = state.loss_scale
        param_squares = squares(state.params)
        metrics = step_metrics(losses, squares(grads), param_squares, batch, schedule(state.step), objective)
        metrics |= penalties
        norm = metrics["grad_norm"]
        hessian_grads, finite = curvature_if_due(state, batch)
        sound = jnp.isfinite(sum(param_squares.values()))
        good = jnp.isfinite(losses.objective) & jnp.isfinite(norm) & finite & sound
        overflow = jnp.zeros((), bool)
        if loss_scale is not None:
            overflow = jnp.isfinite(losses.objective) & sound & ~good & (loss_scale.scale > SMALLEST_LOSS_SCALE)
            metrics |= {"loss_scale": loss_scale.scale, "overflow": overflow.astype(jnp.int32)}
            loss_scale = loss_scale.after(good, overflow)
        metrics["bad"] = (~good & ~overflow).astype(jnp.int32)

        def updated(opt_state: optax.OptState) -> tuple[optax.OptState, tuple[Params, Metrics]]:
            if by_layer:
                # Writes in place come after the last reading of the old parameters, or XLA copies them.
                begins, _ = jax.lax.optimization_barrier((good, metrics))
                visitor = Visitor(LeafUpdate(lm, tx), begins, clips_by(norm), max_grad_value, rounds_by(state))
                params, after = update_by_layer(visitor, lm, state.params, grads, opt_state, scattered=scattered)
                return after, (params, {})
            before = state._replace(opt_state=opt_state)
            updates, after = updates_of(before, clipped(grads, norm), hessian_grads)
            new, old = (applied(before, updates), after), (before.params, opt_state)
            params, after = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
            if curvature is None:
                return after, (params, {})
            return after, (params, {"sophia_win_rate": curvature.win_rate(after, params, lm.padded)})

        opt_state, (params, of_update) = in_pieces(updated, state.opt_state)
        metrics |= of_update
        return TrainState(state.step + good, params, state.frozen, opt_state, loss_scale), metrics

    return step


def step_metrics(
    losses: Losses,
    grad_squares: Mapping[str, jax.Array],
    param_squares: Mapping[str, jax.Array],
    batch: Batch,
    learning_rate: Any,
    objective: Objective,
) -> dict[str, jax.Array]:
    """The metrics of `make_step` that every step has; squares: `norms.squares` of gradients and parameters."""
    metrics = {
        "loss": losses.cross_entropy,
        "learning_rate": jnp.asarray(learning_rate),
        "trained_tokens": jnp.sum(batch["loss_mask"]),
        **norms("grad_norm", grad_squares),
        **{name: norm for name, norm in norms("param_norm", param_squares).items() if "/" in name},
    }
    if objective != CROSS_ENTROPY:
        metrics["objective"] = losses.objective
    return {**metrics, **losses.parts}
