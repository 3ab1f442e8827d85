"""Walks over a stack of equal blocks: the same block, executed in different ways."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax

from jaxllm.core.tree import Params
from jaxllm.nn.cache import LayerCache

Remat = Literal["none", "dots", "full"]

# What the backward pass finds saved; it computes the rest again.
REMAT_POLICIES: dict[Remat, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Block = Callable[[Params, jax.Array, LayerCache | None], tuple[jax.Array, LayerCache | None]]


class Stack(Protocol):
    """A forward walk: applies `block` with each layer's slice of `stacked`, first to last."""

    def __call__(
        self, block: Block, stacked: Params, x: jax.Array, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]: ...


def _rematerialised(block: Block, remat: Remat) -> Block:
    policy = REMAT_POLICIES[remat]
    return block if policy is None else jax.checkpoint(block, policy=policy)


def scan(remat: Remat = "none", unroll: int = 1) -> Stack:
    """One compiled block, looped: compile time does not grow with depth."""

    def walk(
        block: Block, stacked: Params, x: jax.Array, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        step = _rematerialised(block, remat)

        def body(x: jax.Array, layer: tuple[Params, LayerCache | None]):
            return step(layer[0], x, layer[1])

        return jax.lax.scan(body, x, (stacked, cache), unroll=unroll)

    return walk


def loop(remat: Remat = "none") -> Stack:
    """The blocks written out one after the other: the plain meaning of a stack, for tests and for debugging."""

    def walk(
        block: Block, stacked: Params, x: jax.Array, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        step = _rematerialised(block, remat)
        caches = []
        for i in range(jax.tree.leaves(stacked)[0].shape[0]):
            layer = jax.tree.map(lambda a, i=i: a[i], (stacked, cache))
            x, written = step(layer[0], x, layer[1])
            caches.append(written)
        return x, None if cache is None else jax.tree.map(lambda *a: jax.numpy.stack(a), *caches)

    return walk
