"""The optimizer's state in the host's memory, and on the device while it is used."""

from typing import Any, TypeVar

import jax

Computed = TypeVar("Computed")

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


def brought(state: Any, computed: Computed) -> tuple[Any, Computed]:
    """`state` with all leaves on the device, and `computed` as it is. Of the state, what waits in the host's memory is
    brought when all of `computed` is there."""
    if not any(_waits(leaf) for leaf in jax.tree.leaves(state)):
        return state, computed
    # Nothing else keeps the compiler from copying it at the start of the step, to be there beside all activations.
    state, computed = jax.lax.optimization_barrier((state, computed))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, _DEVICE) if _waits(leaf) else leaf, state), computed


def _waits(leaf: jax.Array) -> bool:
    return jax.typeof(leaf).memory_space == _HOST
