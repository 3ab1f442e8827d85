"""What a backward pass gives to an update: the gradients as one tree, or those of one layer after the other."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import optax

from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch
from jaxllm.step.leaf_update import Limits
from jaxllm.step.state import Metrics, TrainState

Squares = Mapping[str, jax.Array]
"""By the path of each leaf that trains, the sum of the squares of its gradient."""


class Back(Protocol):
    """A batch whose losses are known, and whose gradients are, or can be had.

    finite: whether what else the update is given is.
    """

    @property
    def losses(self) -> Losses: ...
    @property
    def finite(self) -> jax.Array | bool: ...

    def squares(self) -> Squares:
        """Of the gradients, before any parameter is updated."""
        ...

    def apply(self, limits: Limits) -> tuple[Params, optax.OptState, Squares, Metrics]:
        """The update: `(all parameters of the trainable half, the optimizer's state, squares, further metrics)`."""
        ...


class Backward(Protocol):
    """`(lm, tx, state, batch, objective, rows) -> Back`. rows: the places of the layers that train; None = all.

    knows_norm: whether the norm of the gradients is known before the first update without another walk.
    """

    @property
    def knows_norm(self) -> bool: ...

    def __call__(
        self,
        lm: LM,
        tx: Any,
        state: TrainState,
        batch: Batch,
        objective: Objective,
        rows: jax.Array | None,
    ) -> Back: ...
