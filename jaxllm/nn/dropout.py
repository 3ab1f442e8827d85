"""Dropout whose masks do not depend on the mesh, nor on how a batch is cut into micro-batches."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Zeroes entries with probability `rate` and divides the others by 1 − rate (Srivastava et al., JMLR 15, 2014).

    keys: `[B]` random keys, one for each sequence.
    """

    rate: float = field(metadata={"static": True})
    keys: jax.Array

    def at(self, place: int | jax.Array) -> "Dropout":
        """The dropout of one of several places (layers, sublayers), which draw separately."""
        return replace(self, keys=jax.vmap(jax.random.fold_in, (0, None))(self.keys, place))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, …]` → the same shape and dtype."""
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(self.keys)
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), 0)
