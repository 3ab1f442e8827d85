"""The gradient of a batch as one tree: of one micro-batch after the other, summed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Leaves, Params
from jaxllm.models.lm import LM
from jaxllm.models.stack import Stack
from jaxllm.objectives.base import Losses, Objective, TokenScores
from jaxllm.step.batch import Batch, sum_micro, trained_tokens
from jaxllm.step.state import TrainState

Gradient = Callable[[LM, TrainState, Batch, Objective, jax.Array | None], tuple[Losses, Params]]
"""`(lm, state, batch, objective, rows)`: the mean losses of a batch over its trained tokens, and the gradient of the
objective for the trainable half. It has the dtype of the parameters if there is one micro-batch, otherwise at least
float32. Where the state has a loss scale, the gradient is multiplied by it.

rows: `[n]` int32, the places of the layers that train, and the gradient has theirs, `[n, …]`; None = all layers."""


def accumulated(stack: Stack) -> Gradient:
    """The gradients of one micro-batch after the other, by walks of `stack` through layers all of which train, summed
    in at least float32."""

    def gradient(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        assert rows is None, "a stack differentiates all layers"
        if lm.aux and batch["tokens"].shape[0] > 1:
            return _over_micro_batches(_with_statistics(lm, stack, state, batch, objective), state.params, batch)
        means = _mean_losses(lm, state, batch, objective)
        return _over_micro_batches(lambda params, micro: means(params, micro, stack), state.params, batch)

    return gradient


def _with_statistics(
    lm: LM, stack: Stack, state: TrainState, batch: Batch, objective: Objective
) -> Callable[[Params, Batch], tuple[jax.Array, Losses]]:
    """`_mean_losses` of an objective that reads the statistics of the whole batch.

    A forward pass beforehand sums them and keeps the scores; so what the objective's derivative for the sums is, which
    every micro-batch adds to by its own statistics, is known before the first one is differentiated.
    """
    trained, factor = trained_tokens(batch), loss_factor(state)

    def forward(params: Params, micro: Batch) -> tuple[Leaves, TokenScores]:
        whole = tree.combine(params, state.frozen)
        out = lm.hidden(whole, micro["tokens"], lm.batch_context(micro), stack)
        return out.aux, lm.scores(whole, out.x, micro, objective)

    total, scores = sum_micro(lambda micro: forward(state.params, micro), dict(batch))

    def of_sums(aux: Leaves) -> jax.Array:
        losses = jax.vmap(lambda scores, micro: objective(scores, micro, aux))(scores, dict(batch))
        return jnp.sum(losses.objective) / trained * factor

    of_total = jax.grad(of_sums)(total)

    def of_micro(params: Params, micro: Batch) -> tuple[jax.Array, Losses]:
        aux, scores = forward(params, micro)
        means = jax.tree.map(lambda total: total / trained, objective(scores, micro, total))
        return means.objective * factor + sum(jnp.vdot(of_total[name], a) for name, a in aux.items()), means

    return of_micro


def penalised(gradient: Gradient, penalty: Callable[[Params], jax.Array]) -> Gradient:
    """`gradient`, with `penalty` of the trainable parameters added to the objective once a step."""

    def whole(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        losses, grads = gradient(lm, state, batch, objective, rows)
        value, of_penalty = jax.value_and_grad(penalty)(state.params)
        factor = loss_factor(state)
        grads = jax.tree.map(lambda g, own: g.astype(at_least_float32(g.dtype)) + own * factor, grads, of_penalty)
        parts = {**losses.parts, "penalty": value, "objective": losses.objective + value}
        return losses._replace(objective=losses.objective + value, parts=parts), grads

    return whole


def loss_factor(state: TrainState) -> Any:
    """What the objective is multiplied by before it is differentiated."""
    return 1 if state.loss_scale is None else state.loss_scale.scale


def _mean_losses(
    lm: LM, state: TrainState, batch: Batch, objective: Objective
) -> Callable[[Params, Batch, Stack], tuple[jax.Array, Losses]]:
    """What a micro-batch of `batch` adds to the mean losses of that, by a walk, at any trainable parameters; and in
    front of it what is differentiated: the objective, multiplied by the state's loss scale."""
    trained, factor = trained_tokens(batch), loss_factor(state)

    def of_micro(params: Params, micro: Batch, stack: Stack) -> tuple[jax.Array, Losses]:
        sums = lm.losses(tree.combine(params, state.frozen), micro, stack, objective)
        means = jax.tree.map(lambda total: total / trained, sums)
        return means.objective * factor, means

    return of_micro


def _over_micro_batches(
    loss: Callable[[Any, Batch], tuple[jax.Array, Losses]], params: Any, batch: Batch
) -> tuple[Losses, Any]:
    """The losses of one micro-batch after the other, and the gradients for `params` of what `loss` has in front of
    them; of several, summed in at least float32."""

    def of_micro(micro: Batch) -> tuple[tuple[Losses, Any], tuple[()]]:
        (_, means), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return (means, grads), ()

    return sum_micro(of_micro, dict(batch))[0]
