"""Updates inside the backward pass: each layer is updated as soon as its gradient is there.

Full-parameter training without the gradient of the whole model: memory for the parameters, the optimizer's state, the
layers' inputs, and the gradients of one layer, of the embedding and of the head. It computes what the step does whose
gradients are one tree. One forward pass keeps each layer's input; the backward pass computes each layer again, once for
all micro-batches. With a limit on the norm there are two backward passes: the norm must be known before the first
update.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.tree import Leaves, Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch
from jaxllm.step.gradient import Gradient, loss_factor
from jaxllm.step.layer_states import LayerStates
from jaxllm.step.layerwise import RECOMPUTED, How, Layerwise
from jaxllm.step.leaf_states import leaf_states
from jaxllm.step.leaf_update import Limits
from jaxllm.step.norms import squares
from jaxllm.step.staged_walks import Staged, StagedRows
from jaxllm.step.state import Metrics, TrainState
from jaxllm.step.walks import Unstaged, Walk

_barrier = jax.lax.optimization_barrier


def sampled(how: How) -> Gradient:
    """The gradient of what trains where some layers do, by one walk without a pipeline.

    The forward pass keeps each layer's input; the backward pass computes each layer again, and takes the gradient of
    the weights of those that train.
    """

    def gradient(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        assert rows is not None, "a walk of some layers needs their places"
        model = Layerwise.of(lm, how, state, batch, objective, loss_factor(state))
        back = Unstaged.of(model, state, rows)
        of_layers, late = back.collected()
        return back.losses, model.nested({**back.known, **late, **of_layers})

    return gradient


@dataclass(frozen=True)
class LayerByLayer:
    """The backward pass whose gradients are those of one layer after the other; see `backward.Backward`."""

    how: How = RECOMPUTED
    knows_norm: bool = False

    def __call__(
        self, lm: LM, tx: Any, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> "InWalk":
        model = Layerwise.of(lm, self.how, state, batch, objective)
        return InWalk(lm, tx, state, rows, model, _walk(lm, model, state, rows))


def _walk(lm: LM, model: Layerwise, state: TrainState, rows: jax.Array | None) -> Walk:
    """The walk of the model's layout through the layers at `rows`, or through all."""
    if lm.layout.stages == 1:
        return Unstaged.of(model, state, rows)
    return Staged.of(lm, model, state) if rows is None else StagedRows.of(lm, model, state, rows)


class InWalk:
    """A batch before its layers are walked back; see `backward.Back`."""

    finite = True

    def __init__(
        self, lm: LM, tx: Any, state: TrainState, rows: jax.Array | None, model: Layerwise, back: Walk
    ) -> None:
        self._lm, self._tx, self._state, self._rows, self._model, self._back = lm, tx, state, rows, model, back
        self.losses: Losses = back.losses
        self._early = dict(back.known)
        self._knows_all = False

    def squares(self) -> Mapping[str, jax.Array]:
        late, of_layers = self._back.squares()
        self._early, self._knows_all = {**self._early, **late}, True
        return {**squares(self._early), **of_layers}

    def apply(self, limits: Limits) -> tuple[Params, optax.OptState, Mapping[str, jax.Array], Metrics]:
        # Every write depends on `limits.good`, which comes after the last reading of the old parameters: else XLA
        # copies them.
        back, rest = self._back, self._model.rest
        states = leaf_states(self._tx, self._lm, self._state, limits)

        def update_rest(grads: Leaves) -> tuple[Leaves, Leaves]:
            return states.update_rest({name: rest[name] for name in grads}, grads)

        # These gradients are dead before the walk starts.
        new_early, dx = _barrier((update_rest(self._early), back.dx))
        # A layer's state is at its place where every layer has one, and at its number among the rows otherwise.
        slots = self._rows if isinstance(self._tx, LayerStates) and self._tx.keeps else None
        layers, of_layers, layer_squares, bottom = back.sweep(dx, states.update_layer, states.layers, slots)
        late = {} if self._knows_all else back.late(bottom)
        new_rest, of_rest = ({**new, **more} for new, more in zip(new_early, update_rest(late), strict=True))
        grad_squares = {**squares({**self._early, **late}), **layer_squares}
        counts = limits.good & jnp.isfinite(sum(grad_squares.values()))
        params = self._model.nested({**new_rest, **layers})
        return params, states.joined(of_rest, of_layers, counts), grad_squares, {}
