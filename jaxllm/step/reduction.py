"""When the gradients of replicas, groups of devices that each have all parameters, are summed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch, trained_tokens
from jaxllm.step.gradient import Gradient
from jaxllm.step.state import REPLICAS, TrainState, over_replicas


def reduced_once(gradient: Gradient, *, scattered: bool = False, dtype: DTypeLike | None = None) -> Gradient:
    """`gradient` with one sum over the replicas a step, however many micro-batches there are.

    scattered: each replica is given a part of the sum, see `over_replicas`. dtype: of what is sent and added; None = at
    least float32, and what the backward pass computes in where there is one micro-batch: it is then reduced once in any
    case, beside that.

    Each replica accumulates a gradient of its own, of its part of every micro-batch, in the memory that the sum would
    take.
    """

    def reduced(lm: LM, state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        losses, grads = summed(lm, state, batch, objective)
        if scattered:
            shardings = tree.flatten(lm.shardings())
            grads = tree.map_with_path(
                lambda path, g: jax.lax.with_sharding_constraint(g, over_replicas(shardings[path], g.shape)), grads
            )
        return losses, grads

    def summed(lm: LM, state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        replicas = lm.layout.mesh.shape[REPLICAS]
        once_anyway = batch["tokens"].shape[0] == 1 and dtype is None
        if replicas == 1 or once_anyway or _splits_parameters(lm):
            return gradient(lm, state, batch, objective)
        trained = trained_tokens(batch)
        replica = replace(lm, layout=lm.layout.without(REPLICAS))

        def of_replica(batch: Batch) -> tuple[Losses, Params]:
            own = trained_tokens(batch)  # what `gradient` divides by
            means = gradient(replica, state, batch, objective)

            def part(mean: jax.Array) -> jax.Array:
                dtype = at_least_float32(mean.dtype)
                return mean * (own.astype(dtype) / trained.astype(dtype))

            return jax.tree.map(part, means)

        def split(a: jax.Array) -> jax.Array:
            micro, rows, *rest = a.shape
            a = jnp.moveaxis(a.reshape(micro, replicas, rows // replicas, *rest), 1, 0)
            return lm.layout.constrain(a, "replicas", "micro", rest_free=True)

        losses, grads = jax.vmap(of_replica, spmd_axis_name=REPLICAS)({name: split(a) for name, a in batch.items()})
        losses = jax.tree.map(lambda parts: jnp.sum(parts, axis=0), losses)
        return losses, jax.tree.map(lambda parts: sum_of_parts(parts, 0, dtype), grads)

    return reduced


def sum_of_parts(parts: jax.Array, axis: int, dtype: DTypeLike | None) -> jax.Array:
    """The sum over `axis`, in the dtype of `parts`. dtype: of what is sent and added, by default the same."""
    # jnp.sum would add, and send, at least float32.
    sent = parts.astype(dtype or parts.dtype)
    return jax.lax.reduce(sent, np.zeros((), sent.dtype), jax.lax.add, (axis,)).astype(parts.dtype)


def _splits_parameters(lm: LM) -> bool:
    """Whether a rule of the config lays parameters on the axis of the replicas, which are none then."""
    return any(REPLICAS in jax.tree.leaves(tuple(sharding.spec)) for sharding in jax.tree.leaves(lm.shardings()))
