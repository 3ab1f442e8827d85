"""The backward walk of an update inside it: what is known before it, and how the layers are visited.

Without a pipeline the gradient of the output comes from the head, and one sweep goes down all layers. For a pipeline
see `staged_walks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.tree import Leaves
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses
from jaxllm.step.layerwise import INDEX, Layerwise, in_embedding, layers_and_rest
from jaxllm.step.state import TrainState
from jaxllm.step.sweep import Visit, Visitor, collected, squared, sweep, updated


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
    def dx(self) -> Any: ...

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        """A walk without updates: `(the gradients that were not known, by path the squares of those of the layers)`."""
        ...

    def sweep(
        self, dx: Any, visit: Visit, state: Leaves, slots: jax.Array | None
    ) -> tuple[Leaves, Leaves, Leaves, Any]:
        """The walk with updates: `(layers, their state, squares, what late makes the other gradients of)`.

        dx: the walk's own. visit: its index is that of a layer in the model. state: of the layers. slots: which row of
        the state each of the rows has; None = as they are counted. See `sweep.updated`."""
        ...

    def late(self, bottom: Any) -> Leaves:
        """The gradients that were not known before the walk."""
        ...


def layers_of(lm: LM, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainable and the frozen half of the layers, the second with their indices."""
    halves = (layers_and_rest(tree.flatten(half))[0] for half in (state.params, state.frozen))
    layers, frozen = halves
    return layers, {**frozen, INDEX: jnp.asarray(lm.layer_order)}


@dataclass(frozen=True)
class Unstaged:
    """Down all layers, of which those at `rows` are visited. kept: of each layer, over the whole batch. of_head: the
    gradients of all that the head reads."""

    model: Layerwise
    layers: Leaves
    frozen: Leaves
    rows: jax.Array | None
    losses: Losses
    of_head: Leaves
    kept: Any
    dx: jax.Array

    @staticmethod
    def of(model: Layerwise, state: TrainState, rows: jax.Array | None) -> "Unstaged":
        layers, frozen = layers_of(model.lm, state)

        def body(x: jax.Array, halves: tuple[Leaves, Leaves]) -> tuple[jax.Array, Any]:
            y, kept, aux = model.forward(*halves, x)
            return y, (kept, aux)

        output, (kept, aux) = jax.lax.scan(body, model.embed(), (layers, frozen), unroll=model.how.unroll)
        losses, of_head, dx, of_aux = model.head(output, jax.tree.map(lambda a: jnp.sum(a, (0, 1)), aux))
        model = replace(model, of_aux=of_aux)
        return Unstaged(model, layers, frozen, rows, losses, of_head, kept, dx)

    @property
    def known(self) -> Leaves:
        return {name: g for name, g in self.of_head.items() if not in_embedding(name)}

    def squares(self) -> tuple[Leaves, Mapping[str, jax.Array]]:
        squares, bottom = self._sweep(self.dx, squared(self.layers))
        return self.late(bottom), squares

    def collected(self) -> tuple[Leaves, Leaves]:
        """A walk without updates: `(the gradients of the rows, [n, …], those that were not known)`."""
        assert self.rows is not None
        visitor = collected(self.model, self.layers, self.frozen, self.kept, self.dx, self.rows)
        of_rows, bottom = self._sweep(self.dx, visitor)
        return of_rows, self.late(bottom)

    def sweep(
        self, dx: Any, visit: Visit, state: Leaves, slots: jax.Array | None
    ) -> tuple[Leaves, Leaves, Leaves, Any]:
        visitor = updated(self.layers, state, visit, self.frozen[INDEX], slots)
        (layers, state, squares), bottom = self._sweep(dx, visitor)
        return layers, state, squares, bottom

    def _sweep(self, dx: jax.Array, visitor: Visitor) -> tuple[Any, jax.Array]:
        to_bottom = any(in_embedding(name) for name in self.model.trainable)
        return sweep(self.model, self.frozen, self.kept, dx, visitor, rows=self.rows, to_bottom=to_bottom)

    def late(self, bottom: Any) -> Leaves:
        return self.model.embed_gradients(bottom, self.of_head)
