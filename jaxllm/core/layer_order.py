"""The order of the layers in arrays that hold all of them, one behind the other in the first dimension."""

from typing import TypeVar

import jax
import numpy as np

from jaxllm.core import tree
from jaxllm.core.host_memory import to_device

State = TypeVar("State")


def rearranged(state: State, places: np.ndarray) -> State:
    """A tree of arrays, in whose leaves of the layers place i has what place `places[i]` had.

    Those are the ones below a `layers`, of parameters or of an optimizer's state. Their buffers are given up one after
    the other, so that no more than one is there twice; where nothing moves, the tree is as it was. One that lies in the
    host's memory lies there again.
    """
    count = len(places)
    if (places == np.arange(count)).all():
        return state

    def moved(path: str, leaf: jax.Array) -> jax.Array:
        if "layers" not in path.split("/") or leaf.shape[:1] != (count,):
            return leaf
        move = jax.jit(lambda x: to_device(x)[places], out_shardings=leaf.sharding)
        new = jax.block_until_ready(move(leaf))
        leaf.delete()
        return new

    return tree.map_with_path(moved, state)
