"""The gradient of a batch: of one micro-batch after the other, summed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.models.stack import Stack
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch, trained_tokens
from jaxllm.step.state import TrainState

Gradient = Callable[[LM, TrainState, Batch, Objective], tuple[Losses, Params]]
"""The mean losses of a batch over its trained tokens, and the gradient of the objective for the trainable half: in the
dtype of the parameters if there is one micro-batch, otherwise in at least float32. Where the state has a loss scale,
the gradient is multiplied by it."""


def accumulated(stack: Stack) -> Gradient:
    """The gradients of one micro-batch after the other, by walks of `stack`, summed in at least float32."""

    def gradient(lm: LM, state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        means = mean_losses(lm, state, batch, objective)
        return over_micro_batches(lambda params, micro: means(params, micro, stack), state.params, batch)

    return gradient


def mean_losses(
    lm: LM, state: TrainState, batch: Batch, objective: Objective
) -> Callable[[Params, Batch, Stack], tuple[jax.Array, Losses]]:
    """What a micro-batch of `batch` adds to the mean losses of that, by a walk, at any trainable parameters; and in
    front of it what is differentiated: the objective, multiplied by the state's loss scale."""
    trained = trained_tokens(batch)
    factor = 1 if state.loss_scale is None else state.loss_scale.scale

    def of_micro(params: Params, micro: Batch, stack: Stack) -> tuple[jax.Array, Losses]:
        sums = lm.losses(tree.combine(params, state.frozen), micro, stack, objective)
        means = jax.tree.map(lambda total: total / trained, sums)
        return means.objective * factor, means

    return of_micro


def over_micro_batches(
    loss: Callable[[Any, Batch], tuple[jax.Array, Losses]], params: Any, batch: Batch
) -> tuple[Losses, Any]:
    """The losses of one micro-batch after the other, and the gradients for `params` of what `loss` has in front of
    them; of several, summed in at least float32."""

    def of_micro(micro: Batch) -> tuple[Losses, Any]:
        (_, means), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return means, grads

    def add(total: tuple[Losses, Any], micro: Batch):
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), total, of_micro(micro)), None

    first = {name: array[0] for name, array in batch.items()}
    if batch["tokens"].shape[0] == 1:
        return of_micro(first)
    shapes = jax.eval_shape(of_micro, first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, at_least_float32(a.dtype)), shapes)
    return jax.lax.scan(add, zeros, dict(batch))[0]
