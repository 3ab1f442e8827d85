"""An optimizer that has a state of its own for each layer that trains, with its own count of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core import tree
from jaxllm.core.tree import Params
from jaxllm.step.selection import Draws
from jaxllm.step.state import map_params

Transform = Callable[[optax.Schedule], optax.GradientTransformationExtraArgs]
"""An optimizer, for a learning rate."""


class LisaState(NamedTuple):
    """The optimizer's state. rest: of what always trains. layers: of single layers, each leaf `[n, …]`: one for each of
    the active ones, or for every layer where they are kept."""

    rest: Any
    layers: Any


@dataclass(frozen=True)
class LayerStates:
    """`transform` for what always trains, and for each layer that `draws` draws."""

    transform: Transform
    schedule: optax.Schedule
    draws: Draws

    @property
    def keeps(self) -> bool:
        """Whether every layer has a state, and not each of the active ones."""
        return self.draws.state == "keep"

    def at(self, step: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer in a step, whose rate its own counts of steps do not tell."""
        rate = self.schedule(step)
        return self.transform(lambda _: rate)

    def init(self, params: Params) -> LisaState:
        """The state before the first step for the trainable `params`."""
        rest, layers = rest_and_layers(params)
        count = None if self.keeps else self.draws.active
        tx = self.at(0)
        return LisaState(tx.init(rest), jax.vmap(self.fresh)(jax.tree.map(lambda a: a[:count], layers)))

    def fresh(self, layer: Params) -> Any:
        """The state of one layer that has not been updated yet."""
        return self.at(0).init(stacked(layer))

    def map_params(self, f: Callable[..., Any], state: Any, params: Params, otherwise: Callable[[Any], Any]) -> Any:
        """See `state.map_params`; a parameter of the layers is given to `f` as its states lie, `[n, 1, …]`."""
        rest, layers = rest_and_layers(params)
        slots = jax.tree.map(self._slots, layers)
        return LisaState(
            map_params(self.at(0), f, state.rest, rest, otherwise),
            map_params(self.at(0), f, state.layers, slots, otherwise),
        )

    def _slots(self, param: Any) -> Any:
        count = param.shape[0] if self.keeps else self.draws.active
        shape = (count, 1, *param.shape[1:])
        if not isinstance(sharding := getattr(param, "sharding", None), NamedSharding):
            return jax.ShapeDtypeStruct(shape, param.dtype)
        first, *others = (*sharding.spec, *(None,) * (param.ndim - len(sharding.spec)))
        spec = PartitionSpec(first if self.keeps else None, None, *others)
        return jax.ShapeDtypeStruct(shape, param.dtype, sharding=NamedSharding(sharding.mesh, spec))

    def update(
        self, grads: Params, state: LisaState, params: Params, step: jax.Array, rows: jax.Array
    ) -> tuple[Params, LisaState]:
        """`(updates, state)` for what trains, whose layers are `[n, …]`."""
        tx, (rest, layers) = self.at(step), rest_and_layers(params)
        rest_grads, layer_grads = rest_and_layers(grads)
        begins, kept = self.begins(step), state.layers
        old_rest, old_layers = state
        if self.keeps:
            old_layers = jax.tree.map(lambda a: a[rows], kept)
        else:
            old_layers = where(begins, jax.vmap(self.fresh)(layers), old_layers)
        if self.draws.state == "reset_all":
            old_rest = where(begins, tx.init(rest), old_rest)
        updates, new_rest = tx.update(rest_grads, old_rest, rest)

        def of_layer(grads: Params, state: Any, params: Params) -> Any:
            updates, state = tx.update(stacked(grads), state, stacked(params))
            return jax.tree.map(lambda a: a[0], updates), state

        layer_updates, new_layers = jax.vmap(of_layer)(layer_grads, old_layers, layers)
        if self.keeps:
            new_layers = jax.tree.map(lambda all, new: all.at[rows].set(new), kept, new_layers)
        return tree.combine(updates, layer_updates), LisaState(new_rest, new_layers)

    def begins(self, step: jax.Array) -> jax.Array:
        """Whether an interval begins with a step."""
        return step % self.draws.interval == 0


def rest_and_layers(params: Params) -> tuple[Params, Params]:
    """The two parts of a tree, each with None in place of the other."""
    nothing = jax.tree.map(lambda _: None, params)
    return {**params, "layers": nothing["layers"]}, {**nothing, "layers": params["layers"]}


def stacked(layer: Params) -> Params:
    """One layer as a stack of one, which is what an optimizer knows."""
    return jax.tree.map(lambda a: a[None], layer)


def where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
