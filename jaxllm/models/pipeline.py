"""The layers of a model in stages, each on devices of its own, that work on different micro-batches at a time.

One program for all devices: a stage is one of the leading dimension of an array that is laid on the mesh axis
`pipeline`. A tick is `vmap` of what a stage does, and `roll` along that dimension hands its results to the next stage.
So data, fsdp and tensor parallelism work inside a stage as they do without a pipeline (Xu et al., "GSPMD", arXiv
2105.04663, section 3.3).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.mesh import Layout
from jaxllm.models.stack import Block, Remat, Stack, Walked, scan
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Context

STAGE_AXES = ("act_stages", "batch", "act_length", "act_embed")
"""The dimensions of what the stages pass on."""


def pipeline(layout: Layout, remat: Remat = "none") -> Stack:
    """A walk through the stages of `layout`: GPipe (Huang et al., arXiv 1811.06965).

    The rows of a batch are as many micro-batches as each data-parallel device has of them, m; of m + p − 1 ticks each
    of p stages works in m. With a cache they are one micro-batch.
    """

    def walk(block: Block, stacked: Any, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Walked:
        stages = jnp.arange(layout.stages)
        micro_batches = 1 if cache is not None else x.shape[0] // layout.size("batch")
        layers, cache = in_stages(stacked, layout), in_stages(cache, layout)
        inputs, contexts = _cut((x, ctx), micro_batches)

        def stage(layers: Any, x: jax.Array, ctx: Context, cache: LayerCache | None) -> Walked:
            return scan(remat)(block, layers, x, ctx, cache)

        def tick(carry: tuple[jax.Array, LayerCache | None], t: jax.Array):
            x, cache = carry
            x = jnp.where(of_stage(0, x), inputs[jnp.minimum(t, micro_batches - 1)], x)
            micro = t - stages
            ctx = jax.tree.map(lambda a: a[jnp.clip(micro, 0, micro_batches - 1)], contexts)
            y, written = on_stages(stage, layout)(layers, layout.constrain(x, *STAGE_AXES), ctx, cache)
            works = (micro >= 0) & (micro < micro_batches)
            cache = jax.tree.map(lambda new, old: jnp.where(_like(works, new), new, old), written, cache)
            y = layout.constrain(y, *STAGE_AXES)
            return (jnp.roll(y, 1, 0), cache), y[-1]

        inputs = layout.constrain(inputs, "micro", *STAGE_AXES[1:])
        first = jnp.broadcast_to(inputs[0], (layout.stages, *inputs.shape[1:]))
        ticks = jnp.arange(micro_batches + layout.stages - 1)
        (_, cache), outputs = jax.lax.scan(tick, (first, cache), ticks)
        y = _whole(outputs[layout.stages - 1 :])
        return layout.constrain(y, "batch", "act_length", "act_embed"), _joined(cache)

    return walk


def in_stages(stacked: Any, layout: Layout) -> Any:
    """Arrays `[L, …]` as `[p, L / p, …]`, each stage's part on its own devices."""

    def split(a: jax.Array) -> jax.Array:
        a = a.reshape(layout.stages, a.shape[0] // layout.stages, *a.shape[1:])
        return layout.constrain(a, "act_stages", rest_free=True)

    return jax.tree.map(split, stacked)


def on_stages(f: Any, layout: Layout) -> Any:
    """`f` of a stage for all stages at once: its arrays, and its results, have a leading dimension of p."""
    return jax.vmap(f, spmd_axis_name="pipeline" if layout.stages > 1 else None)


def of_stage(stage: int, x: jax.Array) -> jax.Array:
    """A mask for x `[p, …]`: True at `stage`."""
    return _like(jnp.arange(x.shape[0]) == stage, x)


def _like(of_stages: jax.Array, x: jax.Array) -> jax.Array:
    return of_stages.reshape(-1, *[1] * (x.ndim - 1))


def _cut(batch: Any, micro_batches: int) -> Any:
    """Arrays `[B, …]` as `[m, B / m, …]`, of which each has rows of every data-parallel device."""

    def cut(a: jax.Array) -> jax.Array:
        if micro_batches == 1:  # a scalar has no rows
            return a[None]
        return a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def _whole(x: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _joined(stages: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stages)
