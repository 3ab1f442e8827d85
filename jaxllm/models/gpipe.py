"""The layers of a model in stages, each on devices of its own, that work on different micro-batches at a time.

One program for all devices: a stage is one of the leading dimension of an array that is laid on the mesh axis
`pipeline`. A tick is `vmap` of what a stage does, and `roll` along that dimension hands its results to the next stage.
So data, fsdp and tensor parallelism work inside a stage as they do without a pipeline (Xu et al., "GSPMD", arXiv
2105.04663, section 3.3).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.mesh import Layout
from jaxllm.models.stack import Block, Output, Remat, Stack, scan
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Context

STAGE_AXES = ("act_stages", "batch", "act_length", "act_embed")
"""The dimensions of what the stages pass on."""


def order_of_layers(layers: int, stages: int, virtual: int) -> np.ndarray:
    """`[L]`: the layer at each place of leaves that lie over `stages`, of which each has `virtual` chunks of layers:
    chunk r of stage s is the one behind r p + s others."""
    return np.arange(layers).reshape(virtual, stages, -1).swapaxes(0, 1).reshape(-1)


def of_pass(u: jax.Array, stages: int, virtual: int) -> tuple[jax.Array, jax.Array]:
    """`(chunk, micro-batch)` of a stage's pass number u: p micro-batches go through one chunk after the other."""
    round_trip = virtual * stages
    return u % round_trip // stages, u // round_trip * stages + u % stages


def pipeline(layout: Layout, remat: Remat = "none", virtual: int = 1) -> Stack:
    """A walk through the stages of `layout`: GPipe (Huang et al., arXiv 1811.06965).

    The rows of a batch are as many micro-batches as each data-parallel device has of them, m; of m + p − 1 ticks each
    of p stages works in m. With a cache they are one micro-batch. virtual: the chunks of layers that each stage has, in
    the order of `order_of_layers`; above 1 micro-batches go round the stages, see `_circular`.
    """
    if virtual > 1:
        return _circular(layout, virtual)

    def walk(block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        stages = jnp.arange(layout.stages)
        micro_batches = 1 if cache is not None else x.shape[0] // layout.size("batch")
        layers, cache = in_stages(stacked, layout), in_stages(cache, layout)
        inputs, contexts = _cut(x, ctx, micro_batches)

        def stage(layers: Any, x: jax.Array, ctx: Context, cache: LayerCache | None) -> Output:
            return scan(remat)(block, layers, x, ctx, cache)

        def tick(carry: tuple[jax.Array, LayerCache | None], t: jax.Array):
            x, cache = carry
            x = jnp.where(of_stage(0, x), inputs[jnp.minimum(t, micro_batches - 1)], x)
            micro = t - stages
            ctx = jax.tree.map(lambda a: a[jnp.clip(micro, 0, micro_batches - 1)], contexts)
            y, aux, written = on_stages(stage, layout)(layers, layout.constrain(x, *STAGE_AXES), ctx, cache)
            works = (micro >= 0) & (micro < micro_batches)
            cache = jax.tree.map(lambda new, old: jnp.where(_like(works, new), new, old), written, cache)
            y = layout.constrain(y, *STAGE_AXES)
            return (jnp.roll(y, 1, 0), cache), (y[-1], _of_working(works, aux))

        inputs = layout.constrain(inputs, "micro", *STAGE_AXES[1:])
        first = jnp.broadcast_to(inputs[0], (layout.stages, *inputs.shape[1:]))
        ticks = jnp.arange(micro_batches + layout.stages - 1)
        (_, cache), (outputs, aux) = jax.lax.scan(tick, (first, cache), ticks)
        y = layout.constrain(_whole(outputs[layout.stages - 1 :]), "batch", "act_length", "act_embed")
        return Output(y, jax.tree.map(lambda a: jnp.sum(a, 0), aux), out_of_stages(cache))

    return walk


def _circular(layout: Layout, virtual: int) -> Stack:
    """A walk in which m micro-batches go round p stages v = `virtual` times, p of them together. A stage works in v m
    of v m + p − 1 ticks, each of one chunk of its layers."""
    stages = layout.stages

    def walk(block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        if cache is not None:
            raise ValueError("there is no cache in a pipeline of virtual stages; walk in the layers' own order")
        layers = in_stages(stacked, layout)
        depth = jax.tree.leaves(layers)[0].shape[1] // virtual
        micro_batches = x.shape[0] // layout.size("batch")
        inputs, contexts = _cut(x, ctx, micro_batches)

        def stage(layers: Any, chunk: jax.Array, x: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
            def body(x: jax.Array, k: jax.Array) -> tuple[jax.Array, Any]:
                layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, chunk * depth + k, 0, False), layers)
                x, aux, _ = block(layer, x, ctx, None)
                return x, dict(aux)

            x, aux = jax.lax.scan(body, x, jnp.arange(depth))
            return x, jax.tree.map(lambda a: jnp.sum(a, 0), aux)

        def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array):
            x, outputs = carry
            chunks, micro = of_pass(t - jnp.arange(stages), stages, virtual)
            first = of_stage(0, x) & (chunks[0] == 0)
            x = jnp.where(first, inputs[jnp.minimum(micro[0], micro_batches - 1)], x)
            ctx = jax.tree.map(lambda a: a[jnp.clip(micro, 0, micro_batches - 1)], contexts)
            y, aux = on_stages(stage, layout)(layers, chunks, layout.constrain(x, *STAGE_AXES), ctx)
            y = layout.constrain(y, *STAGE_AXES)
            works = (t >= jnp.arange(stages)) & (micro < micro_batches)
            # What is not of the last chunk has no place, nor what no micro-batch is behind.
            done = (chunks[-1] == virtual - 1) & (micro[-1] >= 0)
            outputs = outputs.at[jnp.where(done, micro[-1], micro_batches)].set(y[-1], mode="drop")
            return (jnp.roll(y, 1, 0), outputs), _of_working(works, aux)

        inputs = layout.constrain(inputs, "micro", *STAGE_AXES[1:])
        first = jnp.broadcast_to(inputs[0], (stages, *inputs.shape[1:]))
        rounds = -(-micro_batches // stages)
        ticks = jnp.arange(rounds * stages * virtual + stages - 1)
        (_, outputs), aux = jax.lax.scan(tick, (first, jnp.zeros_like(inputs)), ticks)
        y = layout.constrain(_whole(outputs), "batch", "act_length", "act_embed")
        return Output(y, jax.tree.map(lambda a: jnp.sum(a, 0), aux))

    return walk


def in_stages(stacked: Any, layout: Layout) -> Any:
    """Arrays `[L, …]` as `[p, L / p, …]`, each stage's part on its own devices."""

    def split(a: jax.Array) -> jax.Array:
        a = a.reshape(layout.stages, a.shape[0] // layout.stages, *a.shape[1:])
        return layout.constrain(a, "act_stages", rest_free=True)

    return jax.tree.map(split, stacked)


def out_of_stages(stages: Any) -> Any:
    """The inverse of `in_stages`."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stages)


def on_stages(f: Any, layout: Layout) -> Any:
    """`f` of a stage for all stages at once: its arrays, and its results, have a leading dimension of p."""
    return jax.vmap(f, spmd_axis_name="pipeline" if layout.stages > 1 else None)


def of_stage(stage: int, x: jax.Array) -> jax.Array:
    """A mask for x `[p, …]`: True at `stage`."""
    return _like(jnp.arange(x.shape[0]) == stage, x)


def _of_working(works: jax.Array, aux: Any) -> Any:
    """The sums over the stages that work; what is computed in a bubble may be anything."""
    return jax.tree.map(lambda a: jnp.sum(jnp.where(_like(works, a), a, 0), 0), aux)


def _like(of_stages: jax.Array, x: jax.Array) -> jax.Array:
    return of_stages.reshape(-1, *[1] * (x.ndim - 1))


def _cut(x: jax.Array, ctx: Context, micro_batches: int) -> tuple[jax.Array, Context]:
    """x, and the arrays of its context, from `[B, …]` to `[m, B / m, …]`: each part has rows of every data-parallel
    device."""

    def cut(a: jax.Array) -> jax.Array:
        if micro_batches == 1:  # a scalar has no rows
            return a[None]
        return a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1)

    return cut(x), ctx.in_parts(micro_batches, cut)


def _whole(x: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
