"""The backward walk of the fused step: what is known before it, and how the layers are visited.

Without a pipeline the gradient of the output comes from the head, and one sweep goes down all layers. With one the
micro-batches first pass through the stages, which takes the gradients of what each stage gives and of what is not in
the layers; then each stage sweeps its own layers, over all micro-batches, and none waits for another. So the gradient
of one layer exists at a time on each device, for one more computation of the layers: a step is 6 of their forward
passes, of which 3 have no bubble, where the ordinary one is 4; with `max_grad_norm` it is 9.

Each stage keeps the inputs of its layers for all micro-batches, as a device without a pipeline keeps those of all
layers: a micro-batch more takes L/p inputs, and 3 for the gradient of what the stage gives. Compiled for four H100s, a
1B Llama in bfloat16 with AdamW at 8 × 2048 has 917 MiB of temporaries on each, where the ordinary step has 1,530.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.models.gpipe import in_stages, on_stages, out_of_stages
from jaxllm.objectives.base import Losses
from jaxllm.step.layerwise import INDEX, Layerwise, in_embedding
from jaxllm.step.leaf_update import Leaves
from jaxllm.step.pipeline_1f1b import pass_through
from jaxllm.step.sweep import Visit, layer_inputs, layer_sweep, rows_squares, squares_sweep, visited_rows_sweep


class Walk(Protocol):
    """A batch before its layers are walked back.

    losses: the means. known: the gradients, as far as they are known, of what is not in the layers. dx: what the walk
    begins with.
    """

    @property
    def losses(self) -> Losses: ...
    @property
    def known(self) -> Leaves: ...
    @property
    def dx(self) -> jax.Array: ...

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        """A walk without updates: `(the gradients that were not known, by path the squares of those of the layers)`."""
        ...

    def sweep(self, dx: jax.Array, visit: Visit, state: Leaves) -> tuple[Leaves, Leaves, Leaves, Any]:
        """The walk with updates: `(layers, their state, squares, what late makes the other gradients of)`.

        dx: the walk's own. state: of the layers. See `layer_sweep`."""
        ...

    def late(self, bottom: Any) -> Leaves:
        """The gradients that were not known before the walk."""
        ...


def walk(model: Layerwise, layers: Leaves, frozen: Leaves) -> Walk:
    """The walk through `layers`, the trainable half of them, and `frozen`, for the model's layout and batch."""
    return (Staged if model.lm.layout.stages > 1 else Unstaged).of(model, layers, frozen)


def rows_walk(model: Layerwise, layers: Leaves, frozen: Leaves, rows: jax.Array, slots: jax.Array) -> Walk:
    """The walk that visits `rows` of the layers alone, without a pipeline. slots: the rows of their state."""
    whole = Unstaged.of(model, layers, frozen)
    return OfRows(**{field.name: getattr(whole, field.name) for field in fields(whole)}, rows=rows, slots=slots)


@dataclass(frozen=True)
class Unstaged:
    """Down all layers. inputs: of each, for all micro-batches. of_head: the gradients of all that the head reads."""

    model: Layerwise
    layers: Leaves
    frozen: Leaves
    losses: Losses
    of_head: Leaves
    inputs: jax.Array
    dx: jax.Array

    @staticmethod
    def of(model: Layerwise, layers: Leaves, frozen: Leaves) -> "Unstaged":
        inputs, output = layer_inputs(model.block, {**frozen, **layers}, model.embed(), model.batch)
        (losses, of_head), dx = model.head(output)
        return Unstaged(model, layers, frozen, losses, of_head, inputs, dx)

    @property
    def known(self) -> Leaves:
        return {name: g for name, g in self.of_head.items() if not in_embedding(name)}

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        model = self.model
        bottom, squares = squares_sweep(model.block, self.layers, self.frozen, self.inputs, self.dx, model.batch)
        return self.late(bottom), squares

    def sweep(self, dx: jax.Array, visit: Visit, state: Leaves) -> tuple[Leaves, Leaves, Leaves, Any]:
        model, halves = self.model, (self.layers, self.frozen)
        layers, visited, bottom, squares = layer_sweep(
            model.block, *halves, self.inputs, dx, model.batch, visit=visit, state=state
        )
        return dict(layers), dict(visited), dict(squares), bottom

    def late(self, bottom: Any) -> Leaves:
        return self.model.embed_gradients(bottom, self.of_head)


@dataclass(frozen=True)
class OfRows(Unstaged):
    """Down all layers, of which some are visited. rows, slots: see `visited_rows_sweep`."""

    rows: jax.Array
    slots: jax.Array

    @property
    def to_bottom(self) -> bool:
        return any(in_embedding(name) for name in self.model.trainable)

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        model = self.model
        args = (self.layers, self.frozen, self.inputs, self.dx, model.batch, self.rows)
        bottom, squares = rows_squares(model.block, *args, to_bottom=self.to_bottom)
        return self.late(bottom), squares

    def sweep(self, dx: jax.Array, visit: Visit, state: Leaves) -> tuple[Leaves, Leaves, Leaves, Any]:
        model = self.model
        args = (self.layers, self.frozen, self.inputs, dx, model.batch, self.rows)
        layers, visited, bottom, squares = visited_rows_sweep(
            model.block, *args, visit=visit, state=state, slots=self.slots, to_bottom=self.to_bottom
        )
        return dict(layers), dict(visited), dict(squares), bottom


@dataclass(frozen=True)
class Staged:
    """Down the layers of all stages at a time. layers, frozen, inputs: in stages. dx: of what each stage gives."""

    model: Layerwise
    layers: Leaves
    frozen: Leaves
    losses: Losses
    known: Leaves
    inputs: jax.Array
    dx: jax.Array

    @staticmethod
    def of(model: Layerwise, layers: Leaves, frozen: Leaves) -> "Staged":
        lm = model.lm
        others = {name: leaf for name, leaf in model.rest.items() if name not in model.trainable}
        of_layers = {name: leaf for name, leaf in {**frozen, **layers}.items() if name != INDEX}
        trainable = model.nested({name: model.rest[name] for name in model.trainable})
        passed = pass_through(lm, trainable, model.nested({**others, **of_layers}), model.batch, model.objective, "all")
        layers, frozen = in_stages((layers, frozen), lm.layout)
        return Staged(model, layers, frozen, passed.losses, tree.flatten(passed.grads), passed.inputs, passed.dy)

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        def stage(layers: Leaves, frozen: Leaves, inputs: jax.Array, dx: jax.Array) -> Any:
            return squares_sweep(self.model.block, layers, frozen, inputs, dx, self.model.batch)[1]

        squares = on_stages(stage, self.model.lm.layout)(self.layers, self.frozen, self.inputs, self.dx)
        return {}, jax.tree.map(jnp.sum, squares)

    def sweep(self, dx: jax.Array, visit: Visit, state: Leaves) -> tuple[Leaves, Leaves, Leaves, Any]:
        def stage(layers: Leaves, frozen: Leaves, inputs: jax.Array, dx: jax.Array, state: Leaves) -> Any:
            def of_layer(params: Any, grads: Any, state: Any, index: jax.Array) -> Any:
                return visit(params, grads, state, frozen[INDEX][index])

            args = (layers, frozen, inputs, dx, self.model.batch)
            new, visited, _, squares = layer_sweep(self.model.block, *args, visit=of_layer, state=state)
            return new, visited, squares

        layout = self.model.lm.layout
        run = on_stages(stage, layout)
        layers, state, squares = run(self.layers, self.frozen, self.inputs, dx, in_stages(state, layout))
        return out_of_stages(layers), out_of_stages(state), jax.tree.map(jnp.sum, squares), ()

    def late(self, bottom: Any) -> Leaves:
        return {}
