"""The fused training step: the optimizer's update of each layer inside the backward walk.

Full-parameter training without the gradient of the whole model: memory for the parameters, the optimizer's state, the
layers' inputs, and the gradients of one layer, of the embedding and of the head. It computes what the ordinary step
does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.models.lm import LM
from jaxllm.objectives.base import CROSS_ENTROPY, Objective
from jaxllm.optim.clip import clip_coefficient
from jaxllm.step.batch import ROUNDING, Batch, step_key, with_dropout
from jaxllm.step.layerwise import INDEX, Layerwise, layers_and_rest
from jaxllm.step.leaf_update import LeafUpdate, Leaves, Visitor
from jaxllm.step.norms import squares
from jaxllm.step.state import Metrics, Step, TrainState
from jaxllm.step.update import step_metrics
from jaxllm.step.walks import walk

_barrier = jax.lax.optimization_barrier


def make_fused_step(
    lm: LM,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    seed: int = 0,
    stochastic_rounding: bool = False,
) -> Step:
    """A step with the arguments, results and metrics of `make_step`, whose updates happen layer by layer.

    `tx` must treat leaves separately, and the layers of a stack too (`wrappers.per_layer` sees to that).

    One forward pass keeps each layer's input; the backward pass computes each layer again, once for all micro-batches.
    With `max_grad_norm` there are two backward passes: the norm must be known before the first update.

    A loss that is not finite leaves parameters and optimizer state as they are; so does a norm that is not, where it is
    known beforehand. Without `max_grad_norm`, those layers keep theirs whose own gradients are not finite.
    """
    update = LeafUpdate(lm, tx)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        slots, common = update.split(state.params, state.opt_state)
        layers, rest = layers_and_rest(tree.flatten(state.params))
        frozen_layers, frozen_rest = layers_and_rest(tree.flatten(state.frozen))
        frozen_layers[INDEX] = jnp.arange(lm.config.num_hidden_layers)
        drawn = with_dropout(lm, batch, seed, state.step)
        model = Layerwise(lm, update.nested, {**frozen_rest, **rest}, rest.keys(), dict(drawn), objective)
        rounding = step_key(seed, state.step, ROUNDING) if stochastic_rounding else None

        back = walk(model, layers, frozen_layers)
        param_squares = squares(state.params)
        # Every write depends on this, and so comes after the last reading of the old parameters: else XLA copies them.
        good, coefficient = jnp.isfinite(back.losses.objective) & jnp.isfinite(sum(param_squares.values())), None
        early = back.known
        if max_grad_norm is not None:
            late, of_layers = back.squares()
            early = {**early, **late}
            norm = jnp.sqrt(sum(squares(early).values()) + sum(of_layers.values()))
            coefficient, good = clip_coefficient(norm, max_grad_norm), good & jnp.isfinite(norm)

        visitor = Visitor(update, good, coefficient, max_grad_value, rounding)

        def visit(params: Any, grads: Any, slots: Any, index: jax.Array | None = None) -> tuple[Leaves, Leaves]:
            return visitor(params, grads, slots, common, index)[:2]

        def visit_rest(grads: Leaves) -> tuple[Leaves, Leaves]:
            return visit({name: rest[name] for name in grads}, grads, {name: slots[name] for name in grads})

        # These gradients are dead before the walk starts.
        new_early, dx = _barrier((visit_rest(early), back.dx))
        *new_layers, layer_squares, bottom = back.sweep(dx, visit, {name: slots[name] for name in layers})
        late = back.late(bottom) if max_grad_norm is None else {}
        visited = (new_early, new_layers, visit_rest(late))
        params, slots = (
            {name: leaf for part in parts for name, leaf in part.items()} for parts in zip(*visited, strict=True)
        )

        grad_squares = {**squares({**early, **late}), **layer_squares}
        metrics = step_metrics(back.losses, grad_squares, param_squares, batch, schedule(state.step), objective)
        good &= jnp.isfinite(metrics["grad_norm"])
        counted = jax.tree.map(lambda new, old: jnp.where(good, new, old), update({}, {}, {}, common)[2], common)
        params = update.nested(params)
        opt_state = update.join(params, slots, counted)
        return TrainState(state.step + good, params, state.frozen, opt_state), metrics | {
            "bad": (~good).astype(jnp.int32)
        }

    return step
