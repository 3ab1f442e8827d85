"""What a training step carries, and what a finished one tells."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params


class TrainState(NamedTuple):
    """The state of a run between two steps.

    step: int32 scalar, updates applied, which the schedule counts. params, frozen: the two halves of
    `tree.partition` by what trains.
    """

    step: Any
    params: Params
    frozen: Params
    opt_state: optax.OptState


@dataclass(frozen=True)
class Event:
    """A step has been dispatched.

    step: updates done when it is finished. state: the state after it, valid until the next event is asked for.
    finished: `{step: metrics}` of the steps whose results have arrived since the last event. last: whether this is
    the last event, because the run is complete or was told to stop.
    """

    step: int
    state: TrainState
    last: bool
    finished: Mapping[int, Mapping[str, float]]


def new_state(params: Params, trainable: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Frozen leaves get no optimizer state."""
    chosen, frozen = tree.partition(params, trainable)
    return TrainState(jnp.zeros((), jnp.int32), chosen, frozen, tx.init(chosen))


def abstract_state(params: Params, trainable: Any, tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of `new_state`, for abstract `params` that have shardings.

    A leaf of the optimizer's state that is shaped like its parameter is laid out like it, any other one is held
    whole by every device.
    """
    shapes = jax.eval_shape(lambda params: new_state(params, trainable, tx), params)

    def place(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def like_parameter(leaf: jax.ShapeDtypeStruct, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        same = leaf.shape == param.shape
        return place(leaf, param.sharding if same else layout.replicated)

    chosen, frozen = tree.partition(params, trainable)
    opt_state = optax.tree.map_params(
        tx,
        like_parameter,
        shapes.opt_state,
        chosen,
        transform_non_params=lambda leaf: place(leaf, layout.replicated),
    )
    return TrainState(place(shapes.step, layout.replicated), chosen, frozen, opt_state)
