"""Walks over a stack of equal blocks: the same block, executed in different ways."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from pydantic import Discriminator, Tag, model_validator

from jaxllm.core.config import Section
from jaxllm.core.host_memory import DEVICE, HOST, check_host_memory
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.checkpoint_names import TensorName
from jaxllm.nn.context import Context


class NamedTensors(Section):
    """What the backward pass finds of a block, by name; it computes the rest again."""

    save: tuple[TensorName, ...] = ()
    """results that stay on the device: attn_q, attn_k, attn_v (turned), attn_context, attn_out, mlp_gate, mlp_up,
    mlp_hidden (the product of both), mlp_out"""
    offload: tuple[TensorName, ...] = ()
    """results that wait in the host's memory (on a CPU that is the same memory)"""

    @model_validator(mode="after")
    def _each_in_one_place(self) -> "NamedTensors":
        if both := sorted(set(self.save) & set(self.offload)):
            raise ValueError(f"save and offload both name {', '.join(both)}; leave it in one of them")
        return self


def _by_name_or_tensors(value: Any) -> str:
    return "policy" if isinstance(value, str) else "tensors"


RematPolicy = Literal["none", "dots", "offload_dots", "full"]
Remat = RematPolicy | NamedTensors

RematConfig = Annotated[
    Annotated[RematPolicy, Tag("policy")] | Annotated[NamedTensors, Tag("tensors")],
    Discriminator(_by_name_or_tensors),
]
"""A `Remat` in a config: what is wrong with it is said of the form that was written."""


_POLICIES = jax.checkpoint_policies
_NAMED_POLICIES = {
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "offload_dots": _POLICIES.offload_dot_with_no_batch_dims(DEVICE, HOST),
    "full": _POLICIES.nothing_saveable,
}


def check_offload(remat: Remat, device: Any) -> None:
    """Raises UserError if `remat` keeps results in the host's memory and `device` cannot reach any."""
    if remat == "offload_dots" or (isinstance(remat, NamedTensors) and remat.offload):
        check_host_memory(device, "train.remat keeps results", "use dots or full")


class Output(NamedTuple):
    """What a block returns, or a walk through several.

    x: `[B, T, D]`. aux: statistics that add up over layers and micro-batches, such as the tokens of each expert, float;
    of a walk their sums over the layers. cache: with this pass's keys and values written into it.
    """

    x: jax.Array
    aux: Mapping[str, jax.Array] = {}
    cache: LayerCache | None = None


Block = Callable[[Any, jax.Array, Context, LayerCache | None], Output]


class Stack(Protocol):
    """A forward walk: applies `block` with each layer's slice of `stacked`, a tree of `[L, …]`, first to last.

    ctx: of the batch x `[B, T, D]`; a walk may give it to `block` in parts, with the rows of x that it belongs to.
    """

    def __call__(
        self, block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None
    ) -> Output: ...


def rematerialised(block: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`block`, whose backward pass finds what `remat` keeps and recomputes the rest."""
    if remat == "none":
        return block
    if isinstance(remat, NamedTensors):
        names = dict(names_which_can_be_saved=remat.save, names_which_can_be_offloaded=remat.offload)
        policy = _POLICIES.save_and_offload_only_these_names(**names, offload_src=DEVICE, offload_dst=HOST)
    else:
        policy = _NAMED_POLICIES[remat]
    return jax.checkpoint(block, policy=policy)


def scan(remat: Remat = "none", unroll: int | Literal["all"] = 1) -> Stack:
    """One compiled block, looped: compile time does not grow with depth.

    unroll: how many blocks the body of the loop has, at the compile time of as many; "all" leaves no loop.
    """

    def walk(block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        step = rematerialised(lambda layer, x, cache: block(layer, x, ctx, cache), remat)

        def body(x: jax.Array, layer: tuple[Any, LayerCache | None]) -> tuple[jax.Array, Any]:
            x, aux, written = step(layer[0], x, layer[1])
            return x, (dict(aux), written)

        whole = True if unroll == "all" else unroll
        x, (aux, cache) = jax.lax.scan(body, x, (stacked, cache), unroll=whole)
        return Output(x, jax.tree.map(lambda a: jnp.sum(a, 0), aux), cache)

    return walk


def loop(remat: Remat = "none") -> Stack:
    """The blocks written out one after the other: the plain meaning of a stack, for tests and for debugging."""

    def walk(block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        step = rematerialised(lambda layer, x, cache: block(layer, x, ctx, cache), remat)
        caches, total = [], {}
        for i in range(jax.tree.leaves(stacked)[0].shape[0]):
            layer = jax.tree.map(lambda a, i=i: a[i], (stacked, cache))
            x, aux, written = step(layer[0], x, layer[1])
            caches.append(written)
            total = {name: total.get(name, 0) + a for name, a in aux.items()}
        return Output(x, total, None if cache is None else jax.tree.map(lambda *a: jnp.stack(a), *caches))

    return walk
