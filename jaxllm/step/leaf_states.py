"""The state of an optimizer taken apart into what belongs to each leaf, for updates of some leaves at a time."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.host_memory import to_device, to_host, waits_on_host
from jaxllm.core.tree import Leaves
from jaxllm.models.lm import LM
from jaxllm.step.layer_states import LayerStates, LisaState, rest_and_layers, where
from jaxllm.step.layerwise import layers_and_rest
from jaxllm.step.leaf_update import GuardedUpdate, LeafUpdate, Limits
from jaxllm.step.state import TrainState


class LeafStates(Protocol):
    """rest, layers: by path, the state of a leaf that is in no layer, and of a stack of layers, `[rows, …]`."""

    @property
    def rest(self) -> Leaves: ...
    @property
    def layers(self) -> Leaves: ...

    def update_rest(self, params: Leaves, grads: Leaves) -> tuple[Leaves, Leaves]:
        """`(parameters, state)` of some leaves of the rest."""
        ...

    def update_layer(self, params: Any, grads: Any, state: Any, index: jax.Array) -> tuple[Leaves, Leaves]:
        """`(parameters, state)` of some leaves of one layer, with a leading axis of 1. index: `[1]`, which it is."""
        ...

    def joined(self, rest: Leaves, layers: Leaves, good: jax.Array) -> optax.OptState:
        """The state from its parts. good: whether the step counts."""
        ...


def leaf_states(
    tx: optax.GradientTransformationExtraArgs | LayerStates, lm: LM, state: TrainState, limits: Limits
) -> LeafStates:
    """The state of `tx` by leaf, and its updates under `limits`. `tx` must treat leaves separately, and the layers of a
    stack too (`wrappers.per_layer` sees to that)."""
    if isinstance(tx, LayerStates):
        return _OfEachLayer(tx, GuardedUpdate(LeafUpdate(lm, tx.at(state.step)), limits), state)
    return _OfWholeStacks.of(GuardedUpdate(LeafUpdate(lm, tx), limits), state)


@dataclass(frozen=True)
class _OfWholeStacks:
    """common: what is common to all leaves, such as the count of steps."""

    update: GuardedUpdate
    params: Any
    rest: Leaves
    layers: Leaves
    common: list[Any]

    @staticmethod
    def of(update: GuardedUpdate, state: TrainState) -> "_OfWholeStacks":
        slots, common = update.update.split(state.params, state.opt_state)
        layers, rest = layers_and_rest(slots)
        return _OfWholeStacks(update, state.params, rest, layers, common)

    def update_rest(self, params: Leaves, grads: Leaves) -> tuple[Leaves, Leaves]:
        slots = {name: self.rest[name] for name in grads}
        new, new_slots, _ = self.update(params, grads, _here(slots), self.common)
        return new, _back(new_slots, slots)

    def update_layer(self, params: Any, grads: Any, state: Any, index: jax.Array) -> tuple[Leaves, Leaves]:
        return self.update(params, grads, state, self.common, index)[:2]

    def joined(self, rest: Leaves, layers: Leaves, good: jax.Array) -> optax.OptState:
        return self.update.update.join(self.params, {**rest, **layers}, _counted(self.update, self.common, good))


class _OfEachLayer:
    """A layer's own counts are beside each of its leaves."""

    def __init__(self, tx: LayerStates, update: GuardedUpdate, state: TrainState) -> None:
        self.tx, self.update, self.begins = tx, update, tx.begins(state.step)
        self.params = rest_and_layers(state.params)
        opt_state: Any = state.opt_state
        self.rest, self.common = update.update.split(self.params[0], opt_state.rest)
        slots, self.counts = update.update.split(self.params[1], opt_state.layers)
        self.layers: Leaves = {name: (slots[name], self.counts) for name in slots}

    def update_rest(self, params: Leaves, grads: Leaves) -> tuple[Leaves, Leaves]:
        slots = {name: self.rest[name] for name in grads}
        old, common = self._begun((_here(slots), self.common), params, self.tx.draws.state == "reset_all")
        new, new_slots, _ = self.update(params, grads, old, common)
        return new, _back(new_slots, slots)

    def update_layer(self, params: Any, grads: Any, state: Any, index: jax.Array) -> tuple[Leaves, Leaves]:
        slots = jax.tree.map(lambda a: a[0], {name: own for name, (own, _) in state.items()})
        counts = jax.tree.map(lambda a: a[0], next(iter(state.values()))[1])
        slots, counts = self._begun((slots, counts), params, not self.tx.keeps)
        new, slots, counts = self.update(params, grads, slots, counts, index)
        return new, jax.tree.map(lambda a: a[None], {name: (slots[name], counts) for name in state})

    def _begun(self, state: tuple[Leaves, list[Any]], params: Leaves, starts_anew: bool) -> Any:
        """The state of some leaves before a step: where an interval begins, as of leaves never updated."""
        if not starts_anew:
            return state
        nested = self.update.update.nested(params)
        return where(self.begins, self.update.update.split(nested, self.tx.at(0).init(nested)), state)

    def joined(self, rest: Leaves, layers: Leaves, good: jax.Array) -> optax.OptState:
        join, (of_rest, of_layers) = self.update.update.join, self.params
        common = self._begun(({}, self.common), {}, self.tx.draws.state == "reset_all")[1]
        counts = next(iter(layers.values()))[1] if layers else self.counts
        slots = {name: own for name, (own, _) in layers.items()}
        return LisaState(join(of_rest, rest, _counted(self.update, common, good)), join(of_layers, slots, counts))


def _counted(update: GuardedUpdate, common: list[Any], good: jax.Array) -> list[Any]:
    """What is common to all leaves after a step."""
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), update.update({}, {}, {}, common)[2], common)


def _here(slots: Any) -> Any:
    """`slots` on the device."""
    return jax.tree.map(lambda a: to_device(a) if waits_on_host(a) else a, slots)


def _back(new: Any, old: Any) -> Any:
    """`new` in the memories of `old`."""
    return jax.tree.map(lambda a, b: to_host(a) if waits_on_host(b) else a, new, old)
