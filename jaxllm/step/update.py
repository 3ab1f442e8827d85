"""The training step: what trains, its gradients, limits on them, and the optimizer."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.models.lm import LM
from jaxllm.objectives.base import CROSS_ENTROPY, Losses, Objective
from jaxllm.optim.clip import clip_coefficient
from jaxllm.step.backward import Backward
from jaxllm.step.batch import ROUNDING, Batch, step_key, with_dropout
from jaxllm.step.layer_states import LayerStates
from jaxllm.step.leaf_update import Limits
from jaxllm.step.norms import norms, squares
from jaxllm.step.selection import EVERYTHING, Selection
from jaxllm.step.state import SMALLEST_LOSS_SCALE, Metrics, Step, TrainState
from jaxllm.step.sweep import take


def make_step(
    lm: LM,
    tx: optax.GradientTransformationExtraArgs | LayerStates,
    schedule: optax.Schedule,
    *,
    backward: Backward,
    selection: Selection = EVERYTHING,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    seed: int = 0,
    stochastic_rounding: bool = False,
) -> Step:
    """A step over batches of arrays `[micro-batches, sequences, T]`: `selection` × `backward` × `tx`.

    The objective is the mean over all trained tokens of the whole batch, so that the result does not depend on how
    the batch is cut into micro-batches, nor on how `backward` walks through them. With `max_grad_norm`, the gradient is
    scaled by min(1, max_grad_norm / (norm + 1e-6)), norm being that of all that trains in the step. With
    `max_grad_value`, its entries are clamped to ±max_grad_value before that (the norm is of the unclamped ones).

    A loss or gradient that is not finite leaves parameters, optimizer state and the schedule's step as they are. So do
    parameters whose norm is not finite: a model normalises what such weights make to 0, and its loss is finite. Where
    `backward` gives the gradients of one layer after the other and there is no `max_grad_norm`, the norm is not known
    before the first update: then those leaves keep theirs whose own gradients are not finite.

    seed: of what is drawn, anew for each step: what `lm.dropout` drops, a mask for each sequence, and how bfloat16
    parameters are rounded where `stochastic_rounding`.

    Where the state has a loss scale, the objective is multiplied by it before it is differentiated, and the float32
    gradient divided by it after. A gradient that is not finite then counts as an overflow of float16, and lowers the
    scale; it counts as bad only where the loss is not finite either or the scale is the smallest already.

    Metrics: `loss` (the mean cross entropy, whatever is minimised), `grad_norm` (before clipping), `learning_rate`,
    `trained_tokens`, `bad` (1 for a step that was not applied); `grad_norm/<group>` and `param_norm/<group>` (before
    the update) of what trains, see `norms.norms`; `objective` where it is not the loss, and its parts, such as `z_loss`
    and `penalty`; `loss_scale` (the one used) and `overflow` (1 for such a step) where there is one; `sophia_win_rate`
    with a curvature: the share of entries that were not clipped.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = with_dropout(lm, batch, seed, state.step)
        rows = selection.rows(state.step)
        back = backward(lm, tx, state, batch, objective, rows)
        param_squares = _squares_of_active(lm, state, rows)
        sound = jnp.isfinite(back.losses.objective) & jnp.isfinite(sum(param_squares.values()))
        good, coefficient = sound & back.finite, None
        if backward.knows_norm or max_grad_norm is not None:
            norm = jnp.sqrt(sum(back.squares().values()))
            good &= jnp.isfinite(norm)
            coefficient = None if max_grad_norm is None else clip_coefficient(norm, max_grad_norm)
        rounding = step_key(seed, state.step, ROUNDING) if stochastic_rounding else None
        params, opt_state, grad_squares, of_update = back.apply(Limits(good, coefficient, max_grad_value, rounding))

        metrics = step_metrics(back.losses, grad_squares, param_squares, batch, schedule(state.step), objective)
        good &= jnp.isfinite(metrics["grad_norm"])
        overflow, loss_scale = jnp.zeros((), bool), state.loss_scale
        if loss_scale is not None:
            overflow = sound & ~good & (loss_scale.scale > SMALLEST_LOSS_SCALE)
            metrics |= {"loss_scale": loss_scale.scale, "overflow": overflow.astype(jnp.int32)}
            loss_scale = loss_scale.after(good, overflow)
        metrics |= {"bad": (~good & ~overflow).astype(jnp.int32), **of_update}
        return TrainState(state.step + good, params, state.frozen, opt_state, loss_scale), metrics

    return step


def _squares_of_active(lm: LM, state: TrainState, rows: jax.Array | None) -> dict[str, jax.Array]:
    """The squares of what trains in a step, without a copy of the layers that do."""
    if rows is None:
        return squares(state.params)
    layers = state.params["layers"]
    if lm.layout.stages == 1:
        by_row = jax.lax.map(lambda row: squares(take(layers, row)), rows)
    else:  # one row after the other would be brought from its stage to all
        by_row = {path: each[rows] for path, each in jax.vmap(squares)(layers).items()}
    of_layers = {f"layers/{path}": jnp.sum(each) for path, each in by_row.items()}
    return {**squares({**state.params, "layers": None}), **of_layers}


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
