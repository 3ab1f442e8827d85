"""When the gradients of replicas, groups of devices that each have all parameters, are summed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch, trained_tokens
from jaxllm.step.gradient import Gradient
from jaxllm.step.state import REPLICAS, TrainState, over_replicas


@dataclass(frozen=True)
class Replicas:
    """The replicas of a mesh, each of which sums the gradients of its own sequences before all of them are added.

    count: 1 where all devices compute as one, and the compiler adds what they have. dtype: of what is sent and added;
    None = that of the gradients.
    """

    layout: Layout
    count: int
    dtype: DTypeLike | None = None

    @staticmethod
    def of(lm: LM, micro_batches: int, dtype: DTypeLike | None) -> "Replicas":
        """The replicas of the model's mesh. One micro-batch is reduced once in any case, beside its backward pass."""
        once_anyway = micro_batches == 1 and dtype is None
        # An objective of the whole batch's statistics must see those of all replicas.
        count = 1 if once_anyway or lm.aux or _splits_parameters(lm) else lm.layout.mesh.shape[REPLICAS]
        return Replicas(lm.layout, count, dtype)

    def model(self, lm: LM) -> LM:
        """The model as one replica computes with it."""
        return lm if self.count == 1 else replace(lm, layout=self.layout.without(REPLICAS))

    def split(self, batch: Batch) -> dict[str, jax.Array]:
        """The arrays of a batch `[M, B, …]` as `[R, M, B / R, …]`, each replica's part on its own devices."""

        def split(a: jax.Array) -> jax.Array:
            micro, rows, *rest = a.shape
            a = jnp.moveaxis(a.reshape(micro, self.count, rows // self.count, *rest), 1, 0)
            return self.layout.constrain(a, "replicas", "micro", rest_free=True)

        return dict(batch) if self.count == 1 else {name: split(a) for name, a in batch.items()}

    def each(self, f: Callable[..., Any], *args: Any) -> Any:
        """`f` of each replica's part of `args`, `[R, …]`, and its results likewise; of one replica, `f(*args)`."""
        return f(*args) if self.count == 1 else jax.vmap(f, spmd_axis_name=REPLICAS)(*args)

    def sum(self, parts: Any) -> Any:
        """The sums of gradients over the replicas, in the dtypes that they have."""

        def total(parts: jax.Array) -> jax.Array:
            # jnp.sum would add, and send, at least float32.
            sent = parts.astype(self.dtype or parts.dtype)
            return jax.lax.reduce(sent, np.zeros((), sent.dtype), jax.lax.add, (0,)).astype(parts.dtype)

        return parts if self.count == 1 else jax.tree.map(total, parts)

    def sum_losses(self, parts: Losses) -> Losses:
        """The sums of scalars over the replicas, never in fewer bits."""
        return parts if self.count == 1 else jax.tree.map(lambda a: jnp.sum(a, axis=0), parts)


def reduced_once(gradient: Gradient, *, scattered: bool = False, dtype: DTypeLike | None = None) -> Gradient:
    """`gradient` with one sum over the replicas a step, however many micro-batches there are.

    scattered: each replica is given a part of the sum, see `scattered_tree`. dtype: see `Replicas`; None = at least
    float32, and what the backward pass computes in where there is one micro-batch.

    Each replica accumulates a gradient of its own, of its part of every micro-batch, in the memory that the sum would
    take.
    """

    def reduced(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        losses, grads = summed(lm, state, batch, objective, rows)
        return losses, scattered_tree(grads, lm, sampled=rows is not None) if scattered else grads

    def summed(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        replicas = Replicas.of(lm, batch["tokens"].shape[0], dtype)
        if replicas.count == 1:
            return gradient(lm, state, batch, objective, rows)
        trained = trained_tokens(batch)

        def of_replica(batch: Batch) -> tuple[Losses, Params]:
            own = trained_tokens(batch)  # what `gradient` divides by
            means = gradient(replicas.model(lm), state, batch, objective, rows)

            def part(mean: jax.Array) -> jax.Array:
                dtype = at_least_float32(mean.dtype)
                return mean * (own.astype(dtype) / trained.astype(dtype))

            return jax.tree.map(part, means)

        losses, grads = replicas.each(of_replica, replicas.split(batch))
        return replicas.sum_losses(losses), replicas.sum(grads)

    return reduced


def scattered_tree(grads: Params, lm: LM, *, sampled: bool = False) -> Params:
    """`grads`, of which each replica has a part, see `over_replicas`. sampled: of some layers, `[n, …]`, each of which
    is split by itself."""
    shardings = tree.flatten(lm.shardings())

    def scatter(path: str, g: jax.Array) -> jax.Array:
        whole = 1 if sampled and path.startswith("layers/") else 0
        sharding = without_layers(shardings[path]) if whole else shardings[path]
        return jax.lax.with_sharding_constraint(g, over_replicas(sharding, g.shape, whole))

    return tree.map_with_path(scatter, grads)


def without_layers(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """Where some layers of a stack lie: as a stack does, but on the devices of every stage."""
    spec = jax.sharding.PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def _splits_parameters(lm: LM) -> bool:
    """Whether a rule of the config lays parameters on the axis of the replicas, which are none then."""
    return any(REPLICAS in jax.tree.leaves(tuple(sharding.spec)) for sharding in jax.tree.leaves(lm.shardings()))
