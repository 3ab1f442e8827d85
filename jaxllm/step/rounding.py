"""Updates added to parameters: rounded to the nearest number of the parameter's dtype, or at random."""

import zlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.tree import Params


def apply_updates(
    params: Params, updates: Any, key: jax.Array | None = None, layers: jax.Array | None = None
) -> Params:
    """`params + updates` in the dtypes of the parameters.

    key: bfloat16 parameters are rounded at random by it, each leaf of a layer by bits of its own; None = to nearest.
    layers: `[n]` int32, which layers the leaves of `layers/` are, on their leading axis of n; None = all, in order.
    """
    if key is None:
        return cast(Params, optax.apply_updates(params, updates))

    def add(path: str, param: jax.Array, update: jax.Array) -> jax.Array:
        total = param + update
        if param.dtype != jnp.bfloat16:
            return total.astype(param.dtype)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        if not path.startswith("layers/"):
            return stochastic_round(total, own)
        which = jnp.arange(param.shape[0]) if layers is None else layers
        return jax.vmap(lambda row, layer: stochastic_round(row, jax.random.fold_in(own, layer)))(total, which)

    return jax.tree.map(add, tree.paths(params), params, updates)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 → bfloat16, to one of the two neighbours, so that the expected value is x.

    The upper neighbour's probability is how far x is on the way to it (Gupta et al., arXiv 1502.02551, section 3):
    16 random bits are added below the last place, and what is below it then is cut off. What is not finite stays.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
