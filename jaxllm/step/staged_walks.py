"""The backward walk of an update inside it, on a pipeline.

The micro-batches first pass through the stages, which takes the gradients of what each stage gives and of what is not
in the layers; then each stage sweeps its own layers, over all micro-batches, and none waits for another. So the
gradient of one layer exists at a time on each device, for one more computation of the layers: a step is 6 of their
forward passes, of which 3 have no bubble, where the ordinary one is 4; with a limit on the norm it is 9.

Each stage keeps the inputs of its layers for all micro-batches, as a device without a pipeline keeps those of all
layers: a micro-batch more takes L/p inputs, and 3 for the gradient of what the stage gives. Compiled for four H100s, a
1B Llama in bfloat16 with AdamW at 8 × 2048 has 917 MiB of temporaries on each, where the ordinary step has 1,530. Where
a few layers train, a stage keeps the inputs of these, and the gradients of their outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.host_memory import to_device, to_host, waits_on_host
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Leaves
from jaxllm.models.gpipe import in_stages, on_stages, out_of_stages
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses
from jaxllm.step.batch import Batch
from jaxllm.step.layerwise import INDEX, Layerwise, layers_and_rest
from jaxllm.step.pipeline_1f1b import Passed, pass_through
from jaxllm.step.selection import OwnRows, rows_of_parts
from jaxllm.step.state import TrainState
from jaxllm.step.sweep import Visit, Visitor, squared, sweep, take, updated
from jaxllm.step.walks import layers_of


def _passed(model: Layerwise, state: TrainState, rows: jax.Array | None) -> Passed:
    """The passes of the batch through the stages, which take no gradient of weights of the layers. What they leave of a
    stage lies as the model's batch does."""
    halves = layers_and_rest(tree.flatten(state.params)), layers_and_rest(tree.flatten(state.frozen))
    (layers, rest), (frozen_layers, frozen_rest) = halves
    trainable, frozen = model.nested(rest), model.nested({**frozen_rest, **frozen_layers, **layers})
    replicas = model.replicas

    def of_replica(batch: Batch) -> Passed:
        kept = "all" if rows is None else "rows"
        return pass_through(model.lm, trainable, frozen, batch, model.objective, kept, 1, rows, model.trained)

    passed = replicas.each(of_replica, model.batch)
    if replicas.count == 1:
        return passed

    def inside(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 2)  # behind the stages and the layers

    losses, grads = replicas.sum_losses(passed.losses), replicas.sum(passed.grads)
    return Passed(losses, grads, inside(passed.inputs), inside(passed.dy), passed.of_aux)


@dataclass(frozen=True)
class OnStages:
    """`model`, of which a layer of every stage is computed at a time; see `sweep.Layers`."""

    model: Layerwise
    layout: Layout

    def gradients(self, trainable: Leaves, frozen: Leaves, kept: Any, dy: jax.Array) -> tuple[Leaves, jax.Array]:
        return on_stages(self.model.gradients, self.layout)(trainable, frozen, kept, dy)

    def input_gradient(self, trainable: Leaves, frozen: Leaves, kept: Any, dy: jax.Array) -> jax.Array:
        return on_stages(self.model.input_gradient, self.layout)(trainable, frozen, kept, dy)


@dataclass(frozen=True)
class Staged:
    """Down the layers of all stages at a time. layers, frozen, inputs: in stages. dx: of what each chunk of a stage
    gives."""

    lm: LM
    model: Layerwise
    layers: Leaves
    frozen: Leaves
    losses: Losses
    known: Leaves
    inputs: jax.Array
    dx: jax.Array

    @staticmethod
    def of(lm: LM, model: Layerwise, state: TrainState) -> "Staged":
        passed = _passed(model, state, None)
        model = replace(model, of_aux=passed.of_aux)
        layers, frozen = in_stages(layers_of(lm, state), lm.layout)
        known = model.scattered_rest(tree.flatten(passed.grads))
        return Staged(lm, model, layers, frozen, passed.losses, known, passed.inputs, passed.dy)

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        return {}, self._sweep(self.dx, squared(self.layers))

    def sweep(
        self, dx: Any, visit: Visit, state: Leaves, slots: jax.Array | None
    ) -> tuple[Leaves, Leaves, Leaves, Any]:
        layout = self.lm.layout
        state = in_stages(state, layout)
        visitor = updated(self.layers, state, on_stages(visit, layout), self.frozen[INDEX], axis=1)
        layers, state, squares = self._sweep(dx, visitor)
        return out_of_stages(layers), out_of_stages(state), squares, ()

    def _sweep(self, dx: jax.Array, visitor: Visitor) -> Any:
        virtual, layout = self.lm.virtual_stages, self.lm.layout
        tops = dx if virtual > 1 else dx[:, 0]
        model = OnStages(self.model, layout)
        return sweep(model, self.frozen, self.inputs, tops, visitor, chunks=virtual, axis=1)[0]

    def late(self, bottom: Any) -> Leaves:
        return {}


@dataclass(frozen=True)
class StagedRows:
    """The layers at `rows`, each in its stage. inputs, dx: of each of them, and of its output, `[p, n, …]`.

    A state that waits in the host's memory is brought whole, since each stage takes another of its rows.
    """

    lm: LM
    model: Layerwise
    layers: Leaves
    frozen: Leaves
    rows: jax.Array
    losses: Losses
    known: Leaves
    inputs: jax.Array
    dx: jax.Array

    @staticmethod
    def of(lm: LM, model: Layerwise, state: TrainState, rows: jax.Array) -> "StagedRows":
        passed = _passed(model, state, rows)
        model = replace(model, of_aux=passed.of_aux)
        layers, frozen = in_stages(layers_of(lm, state), lm.layout)
        known = model.scattered_rest(tree.flatten(passed.grads))
        return StagedRows(lm, model, layers, frozen, rows, passed.losses, known, passed.inputs, passed.dy)

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        def visitor(own: OwnRows, layers: Leaves, frozen: Leaves, state: Leaves) -> Callable[[jax.Array], Visitor]:
            return lambda is_own: squared(layers)

        squares = self._on_stages(visitor, self.dx, {}, keeps=False)
        return {}, jax.tree.map(jnp.sum, squares)

    def sweep(
        self, dx: Any, visit: Visit, state: Leaves, slots: jax.Array | None
    ) -> tuple[Leaves, Leaves, Leaves, Any]:
        keeps, layout = slots is not None, self.lm.layout

        def visitor(own: OwnRows, layers: Leaves, frozen: Leaves, state: Leaves) -> Callable[[jax.Array], Visitor]:
            def at(is_own: jax.Array) -> Visitor:
                def if_own(params: Any, grads: Any, state: Any, index: jax.Array) -> Any:
                    new = visit(params, grads, state, index)
                    return jax.tree.map(lambda new, old: jnp.where(is_own, new, old), new, (params, state))

                return updated(layers, state, if_own, frozen[INDEX])

            return at

        here = jax.tree.map(lambda a: to_device(a) if waits_on_host(a) else a, state)
        of_stages = in_stages(here, layout) if keeps else self._for_each_stage(here)
        layers, of_stages, squares = self._on_stages(visitor, dx, of_stages, keeps=keeps)
        new = out_of_stages(of_stages) if keeps else self._of_owners(of_stages)
        state = jax.tree.map(lambda new, old: to_host(new) if waits_on_host(old) else new, new, state)
        return out_of_stages(layers), state, jax.tree.map(jnp.sum, squares), ()

    def _on_stages(self, visitor_of: Any, dx: jax.Array, state: Any, *, keeps: bool) -> Any:
        """What a visitor leaves of each stage after the rows that lie in it. keeps: whether the state of a row is at
        its place in the stage, or at its number among the rows."""
        rows, own = rows_of_parts(self.rows, self.lm.layout.stages, self._depth)
        most = jnp.max(own.count)

        def stage(layers: Leaves, frozen: Leaves, inputs: jax.Array, dx: jax.Array, state: Any, own: OwnRows) -> Any:
            at = visitor_of(own, layers, frozen, state)

            def body(k: jax.Array, carry: Any) -> Any:
                number, is_own = jnp.minimum(own.first + k, len(self.rows) - 1), k < own.count
                slot, visitor = rows.slots[number], at(is_own)
                i = jnp.clip(rows.places[number] - own.offset, 0, self._depth - 1)
                of_layer = take(visitor.trainable(carry), i), take(frozen, i), inputs[slot]
                grads, below = self.model.gradients(*of_layer, dx[slot])
                grads = jax.tree.map(lambda g: jnp.where(is_own, g, 0), grads)
                return visitor.at_layer(carry, grads, below, i, i if keeps else slot)[0]

            return jax.lax.fori_loop(0, most, body, at(jnp.zeros((), bool)).carry)

        args = (self.layers, self.frozen, self.inputs, dx, state, own)
        return on_stages(stage, self.lm.layout)(*args)

    @property
    def _depth(self) -> int:
        """The layers of a stage."""
        return self.frozen[INDEX].shape[1]

    def _for_each_stage(self, state: Leaves) -> Leaves:
        layout = self.lm.layout

        def for_each(a: jax.Array) -> jax.Array:
            a = jnp.broadcast_to(a, (layout.stages, *a.shape))
            return layout.constrain(a, "act_stages", rest_free=True)

        return jax.tree.map(for_each, state)

    def _of_owners(self, state: Leaves) -> Leaves:
        """The state of each row, from the stage that has it."""
        is_owner = self.rows // self._depth == jnp.arange(self.lm.layout.stages)[:, None]

        def of_owner(a: jax.Array) -> jax.Array:
            mask = is_owner.reshape(*is_owner.shape, *[1] * (a.ndim - 2))
            return jnp.sum(jnp.where(mask, a, 0), axis=0, dtype=a.dtype)

        return jax.tree.map(of_owner, state)

    def late(self, bottom: Any) -> Leaves:
        return {}
