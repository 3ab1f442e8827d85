"""The fused training step of LISA: of the few layers that train at a time, each is updated inside the backward walk.

So the gradient of one of them exists at a time, and no second copy of what they and the optimizer keep of them. It
computes what the step of `step.sampled_layers` does.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.objectives.base import CROSS_ENTROPY, Objective
from jaxllm.optim.clip import clip_coefficient
from jaxllm.step.batch import ROUNDING, Batch, step_key, with_dropout
from jaxllm.step.layerwise import INDEX, Layerwise, layers_and_rest
from jaxllm.step.leaf_update import LeafUpdate, Leaves, Visitor
from jaxllm.step.norms import squares
from jaxllm.step.sampled_layers import LisaOptimizer, LisaState
from jaxllm.step.state import Metrics, Step, TrainState
from jaxllm.step.sweep import take
from jaxllm.step.update import step_metrics
from jaxllm.step.walks import rows_walk

_barrier = jax.lax.optimization_barrier


def make_fused_lisa_step(
    optimizer: LisaOptimizer,
    schedule: optax.Schedule,
    *,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    seed: int = 0,
    stochastic_rounding: bool = False,
) -> Step:
    """A step with the arguments, results and metrics of `make_lisa_step`, whose updates happen layer by layer.

    What is said of `make_fused_step` of clipping, and of what is not finite, is true of it too.
    """
    lm, draws = optimizer.lm, optimizer.draws

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        update = LeafUpdate(lm, optimizer.transform(lambda _: schedule(state.step)))
        layers, rest = layers_and_rest(tree.flatten(state.params))
        frozen_layers, frozen_rest = layers_and_rest(tree.flatten(state.frozen))
        frozen_layers[INDEX] = jnp.arange(lm.config.num_hidden_layers)
        rows = draws.rows(state.step, lm.config.num_hidden_layers)
        old_rows = {name: a[rows] for name, a in layers.items()}
        old = optimizer.begun(state.opt_state, {**rest, **old_rows}, state.step)
        rest_slots, common = update.split(update.nested(rest), old.rest)
        # A layer's own counts are beside each of its leaves.
        layer_slots, counts = update.split(update.nested(layers), old.layers)
        of_layers = {name: (layer_slots[name], counts) for name in layers}
        drawn = dict(with_dropout(lm, batch, seed, state.step))
        model = Layerwise(lm, update.nested, {**frozen_rest, **rest}, rest.keys(), drawn, objective)

        slots = rows if draws.state == "keep" else jnp.arange(len(rows))
        back = rows_walk(model, layers, frozen_layers, rows, slots)
        of_rows = jax.lax.map(lambda row: squares(take(layers, row)), rows)  # without a copy of all of them
        param_squares = {**squares(rest), **jax.tree.map(jnp.sum, of_rows)}
        # As in the fused step, every write depends on the last reading of the old parameters.
        good, coefficient = jnp.isfinite(back.losses.objective) & jnp.isfinite(sum(param_squares.values())), None
        early = back.known
        if max_grad_norm is not None:
            late, row_squares = back.squares()
            early = {**early, **late}
            norm = jnp.sqrt(sum(squares(early).values()) + sum(row_squares.values()))
            coefficient, good = clip_coefficient(norm, max_grad_norm), good & jnp.isfinite(norm)
        rounding = step_key(seed, state.step, ROUNDING) if stochastic_rounding else None
        visitor = Visitor(update, good, coefficient, max_grad_value, rounding)

        def visit(params: Any, grads: Any, kept: Mapping[str, Any], index: jax.Array) -> tuple[Leaves, Leaves]:
            own = jax.tree.map(lambda a: a[0], {name: slots for name, (slots, _) in kept.items()})
            counts = jax.tree.map(lambda a: a[0], next(iter(kept.values()))[1])
            new, own, counts = visitor(params, grads, own, counts, index)
            return new, jax.tree.map(lambda a: a[None], {name: (own[name], counts) for name in kept})

        def visit_rest(grads: Leaves) -> tuple[Leaves, Leaves]:
            chosen = ({name: part[name] for name in grads} for part in (rest, rest_slots))
            params, slots = chosen
            return visitor(params, grads, slots, common)[:2]

        new_early, dx = _barrier((visit_rest(early), back.dx))
        layers, of_layers, layer_squares, bottom = back.sweep(dx, visit, of_layers)
        late = back.late(bottom) if max_grad_norm is None else {}
        new_rest, rest_slots = (new | new_late for new, new_late in zip(new_early, visit_rest(late), strict=True))

        grad_squares = {**squares({**early, **late}), **layer_squares}
        metrics = step_metrics(back.losses, grad_squares, param_squares, batch, schedule(state.step), objective)
        good &= jnp.isfinite(metrics["grad_norm"])
        counted = jax.tree.map(lambda new, old: jnp.where(good, new, old), update({}, {}, {}, common)[2], common)
        counts = next(iter(of_layers.values()))[1] if of_layers else counts
        opt_state = LisaState(
            update.join(update.nested(new_rest), rest_slots, counted),
            update.join(update.nested(layers), {name: kept[0] for name, kept in of_layers.items()}, counts),
        )
        params = update.nested({**new_rest, **layers})
        bad = {"bad": (~good).astype(jnp.int32)}
        return TrainState(state.step + good, params, state.frozen, opt_state), metrics | bad

    return step
