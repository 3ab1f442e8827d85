"""When `optim.sophia_g` is told the curvature, and what its updates made of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import optax

from jaxllm.core import tree
from jaxllm.core.tree import Params
from jaxllm.optim.sophia_g import win_rate


@dataclass(frozen=True)
class Curvature:
    """The diagonal of the Gauss-Newton matrix, estimated in every `every`-th update.

    The estimate of Gauss-Newton-Bartlett (Liu et al., "Sophia", arXiv 2305.14342, algorithm 2) is N·ĝ², where ĝ is the
    gradient of the mean cross entropy over the N trained tokens of a batch, whose targets are drawn from the model.

    rho: the optimizer's, for its win rate.
    """

    every: int
    rho: float

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the update after `step` others has an estimate."""
        return (step + 1) % self.every == 0

    def win_rate(self, opt_state: optax.OptState, params: Params, padded: Mapping[str, tuple[int, int]]) -> jax.Array:
        """The share of the entries of `params` that the curvature scales, `LM.padded` not counted."""
        leaves = tree.flatten(params)
        padding = (
            leaves[path].size // leaves[path].shape[axis] * (leaves[path].shape[axis] - size)
            for path, (axis, size) in padded.items()
            if path in leaves
        )
        return win_rate(opt_state, self.rho, 1, sum(padding))
