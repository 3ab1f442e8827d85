"""Gradients that are summed over the devices that share the parameters once a step (`train.reduce: late`).

The layers are mapped over the devices that have sequences of their own: `vmap` of what a device does, with the weights
outside of the map. So each weight is stored in parts and gathered where it is used, as it is without the map, and what
a device's sequences add to its gradient is one of the leading dimension of an array that is laid on the mesh.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxllm.core import tree
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Leaves, Params
from jaxllm.models.lm import LM
from jaxllm.models.stack import Block, Stack, Walked
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Context
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch
from jaxllm.step.gradient import Gradient, accumulated, mean_losses, over_micro_batches
from jaxllm.step.reduction import sum_of_parts
from jaxllm.step.state import TrainState


def accumulated_late(stack: Stack, dtype: DTypeLike | None = None) -> Gradient:
    """`accumulated(stack)`, but the gradients of layers are summed over the devices of a batch once a step.

    Each device accumulates the gradient of whole layers from its own sequences, in at least float32, and holds that of
    a micro-batch besides, in the dtype of the parameters: as much as a replica that has all parameters. (XLA's
    schedule for GPUs, which hides what is sent behind what is computed, may hold one more.) The weights stay in parts,
    and each micro-batch gathers those of a layer at a time, as often as `accumulated` does. dtype: of what is sent and
    added; None = at least float32.

    The gradients of embedding and head are accumulated as they are: the devices split the vocabulary of both, each
    sees all tokens of a micro-batch, and nothing is summed over devices. Where there is one micro-batch it is
    `accumulated(stack)`.
    """
    each = accumulated(stack)

    def gradient(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        devices = lm.layout.size("batch")
        if batch["tokens"].shape[0] == 1 or devices == 1:
            return each(lm, state, batch, objective, rows)
        layers = state.params["layers"]
        rest = {name: part for name, part in state.params.items() if name != "layers"}
        # Nothing reads them: they stand for what the weights are to each device.
        own = {path: jnp.zeros((len(a), devices, *a.shape[1:]), a.dtype) for path, a in tree.flatten(layers).items()}
        means = mean_losses(lm, state, batch, objective)

        def loss(chosen: tuple[Params, Leaves], micro: Batch) -> tuple[jax.Array, Losses]:
            rest, own = chosen
            return means({**rest, "layers": layers}, micro, _on_devices(stack, lm, state, own))

        losses, (rest, own) = over_micro_batches(loss, (rest, own), batch)
        sums = tree.map_with_path(lambda path, _: sum_of_parts(own[path], 1, dtype), layers)
        return losses, {**rest, "layers": sums}

    return gradient


def _on_devices(stack: Stack, lm: LM, state: TrainState, own: Leaves) -> Stack:
    """`stack`, in which each device of a batch walks with its own rows.

    own: what gradients are given to in place of the weights, `[L, devices, …]`.
    """
    layout, axes = lm.layout, [axis for axis in lm.layout.rules["batch"] if lm.layout.mesh.shape[axis] > 1]
    of_device = reduce(Layout.without, axes, layout)
    placed = tree.flatten(of_device.shardings(lm.axes(), lm.abstract())["layers"])
    frozen = tree.flatten(state.frozen["layers"]).keys()

    def split(a: jax.Array) -> jax.Array:
        devices = layout.size("batch")
        return layout.constrain(a.reshape(devices, a.shape[0] // devices, *a.shape[1:]), "batch", rest_free=True)

    def laid_out(gradients: Leaves) -> Leaves:
        of_layer = {path: NamedSharding(layout.mesh, PartitionSpec(*placed[path].spec[1:])) for path in gradients}
        return jax.lax.with_sharding_constraint(gradients, of_layer)

    def walk(block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Walked:
        run = _with_own_gradients(block, laid_out)
        mapped = jax.vmap(run, in_axes=(None, None, 0, 0, 0), spmd_axis_name=axes[0] if len(axes) == 1 else tuple(axes))

        def of_layer(given: Any, x: jax.Array, ctx: Context, cache: LayerCache | None) -> Walked:
            (layer, index), own = given
            leaves = tree.flatten(layer)
            fixed = {path: leaf for path, leaf in leaves.items() if path in frozen}
            moving = {path: leaf for path, leaf in leaves.items() if path not in frozen}
            return mapped((fixed, index), moving, own, x, ctx), cache

        ctx = replace(ctx.in_parts(layout.size("batch"), split), layout=of_device)
        y, cache = stack(of_layer, (stacked, own), split(x), ctx, cache)
        return layout.constrain(y.reshape(x.shape), "batch", "act_length", "act_embed"), cache

    return walk


def _with_own_gradients(block: Block, laid_out: Callable[[Leaves], Leaves]) -> Callable[..., jax.Array]:
    """`block` of one device: the gradients of those of the `moving` weights that are in `own` are given to these.

    Under `vmap` a gradient for what is not mapped, as weights are not, would be summed.
    """

    def plain(fixed: Any, moving: Leaves, x: jax.Array, ctx: Context) -> jax.Array:
        leaves, index = fixed
        return block((tree.insert({}, {**leaves, **moving}), index), x, ctx, None)[0]

    def with_back(fixed: Any, moving: Leaves, x: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
        return jax.vjp(lambda moving, x: plain(fixed, moving, x, ctx), moving, x)

    def go_back(back: Any, dy: jax.Array) -> tuple[Leaves, jax.Array]:
        return back(dy)

    def run(fixed: Any, moving: Leaves, own: Leaves, x: jax.Array, ctx: Context) -> jax.Array:
        # Traced now: where JAX traces the rules of a custom_vjp it has forgotten the axis of the mesh that is mapped
        # over, and a shard_map's gradients would be summed over it.
        forward_of, (y, back) = _traced(with_back, fixed, moving, x, ctx)
        backward_of, _ = _traced(go_back, back, y)

        @jax.custom_vjp
        def apply(fixed: Any, moving: Leaves, own: Leaves, x: jax.Array, ctx: Context) -> jax.Array:
            return plain(fixed, moving, x, ctx)

        def forward(fixed: Any, moving: Leaves, own: Leaves, x: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
            return forward_of(fixed, moving, x, ctx)

        def backward(back: Any, dy: jax.Array):
            gradients, dx = backward_of(back, dy)
            others = {path: None if path in own else gradient for path, gradient in gradients.items()}
            return None, others, laid_out({path: gradients[path] for path in own}), dx, None

        apply.defvjp(forward, backward)
        return apply(fixed, moving, own, x, ctx)

    return run


def _traced(f: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """`f` as it is traced here, and the shapes of what it gives."""
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    run, structure = jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args))), shapes
