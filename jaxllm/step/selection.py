"""What trains in a step: everything that is trainable, or a few layers that are drawn and what belongs to no layer.

LISA (Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", arXiv
2403.17919) draws other layers every so many steps. Which layers train is data of the compiled step, so drawing others
compiles nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.peft.layer_sampling import LisaPolicy
from jaxllm.step.batch import LAYERS, step_key


class Selection(Protocol):
    """What trains in a step."""

    def rows(self, step: jax.Array) -> jax.Array | None:
        """The places of the layers that train in stacks `[L, …]`, `[n]` int32; None = all."""
        ...


@dataclass(frozen=True)
class Everything:
    """All that is trainable trains in every step."""

    def rows(self, step: jax.Array) -> None:
        del step


EVERYTHING = Everything()


@dataclass(frozen=True)
class Draws:
    """Which layers train when. active: how many at a time. interval: steps after which others are drawn. seed: of the
    draws. state: what becomes of the optimizer's state then, see `peft.layer_sampling.LayerDraws.state`.
    """

    active: int
    interval: int
    seed: int
    state: LisaPolicy = "reset_body"

    def rows(self, step: jax.Array, layers: int) -> jax.Array:
        """The layers that train in a step, `[active]` int32 in rising order; they follow from the interval alone."""
        key = step_key(self.seed, step // self.interval, LAYERS)
        return jnp.sort(jax.random.permutation(key, layers)[: self.active])


@dataclass(frozen=True)
class SampledLayers:
    """The layers of `lm` that `draws` draws, and what belongs to no layer."""

    lm: LM
    draws: Draws

    def rows(self, step: jax.Array) -> jax.Array:
        """The places of the drawn layers, in the order of the layers."""
        drawn = self.draws.rows(step, self.lm.config.num_hidden_layers)
        return drawn if self.lm.virtual_stages == 1 else jnp.asarray(np.argsort(self.lm.layer_order))[drawn]


def take_active(params: Params, rows: jax.Array | None) -> Params:
    """Of parameters with all layers what trains, the layers as `[n, …]`."""
    if rows is None:
        return params
    return {**params, "layers": jax.tree.map(lambda a: a[rows], params["layers"])}


def put_active(params: Params, active: Params, rows: jax.Array | None) -> Params:
    """`params` with what trains replaced by `active`: the inverse of `take_active`."""
    if rows is None:
        return active
    layers = jax.tree.map(lambda a, new: a.at[rows].set(new), params["layers"], active["layers"])
    return {**active, "layers": layers}


class SortedRows(NamedTuple):
    """The places of the layers that train in rising order, and the number of each among the rows as they are given."""

    places: jax.Array
    slots: jax.Array


class OwnRows(NamedTuple):
    """Of a part of the layers, the sorted rows `first, …, first + count − 1`, and the place of its first layer."""

    first: jax.Array
    count: jax.Array
    offset: jax.Array


def rows_of_parts(rows: jax.Array, parts: int, size: int) -> tuple[SortedRows, OwnRows]:
    """Which of the rows lie in each of so many parts of `size` layers, one behind the other."""
    slots = jnp.argsort(rows)
    places = rows[slots]
    offsets = size * jnp.arange(parts + 1, dtype=places.dtype)
    bounds = jnp.searchsorted(places, offsets)
    return SortedRows(places, slots), OwnRows(bounds[:-1], jnp.diff(bounds), offsets[:-1])
