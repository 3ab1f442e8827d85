"""Fitting a model to the devices: its layout, and the dtype that it computes in."""

import logging
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.models.family import Family, FamilyConfig
from jaxllm.models.lm import LM

log = logging.getLogger(__name__)


def fitted(
    family: Family,
    config: FamilyConfig,
    layout: Layout,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    source: Any = None,
) -> LM:
    """The model of `config`, with the layout that `fit_layout` makes of `layout`.

    compute_dtype: None = bfloat16 on GPU, float32 on CPU. Raises UserError as `fit_layout` does.
    """
    if compute_dtype is None:
        compute_dtype = "bfloat16" if layout.platform == "gpu" else "float32"
    return LM(family, config, fit_layout(config, layout), param_dtype, jnp.dtype(compute_dtype), source=source)


def fit_layout(config: FamilyConfig, layout: Layout) -> Layout:
    """`layout`, with the key and value heads replicated where they do not divide over the tensor axis.

    Raises UserError if the query heads do not, for a head is never cut in two; and if the layers do not divide over the
    stages of a pipeline, which all have equally many.
    """
    if (layers := config.num_hidden_layers) % layout.stages:
        raise UserError(
            f"the {layers} layers of the model do not divide over mesh.pipeline = {layout.stages}; the nearest sizes "
            f"that work: {_nearest_divisors(layers, layout.stages)}"
        )
    ways, heads = layout.size("act_heads"), config.num_attention_heads
    if heads % ways:
        raise UserError(
            f"the {heads} attention heads of the model do not divide over mesh.tensor = {ways}; the nearest "
            f"sizes that work: {_nearest_divisors(heads, ways)}"
        )
    kv_heads, kv_ways = config.num_key_value_heads, layout.size("act_kv_heads")
    if kv_heads % kv_ways == 0:
        return layout
    log.info("%d key-value heads over mesh.tensor = %d: every device holds all of them", kv_heads, kv_ways)
    return layout.replace(kv_heads=(), act_kv_heads=())


def check_chunks(lm: LM) -> None:
    """Raises UserError if the layers of a stage do not divide over its chunks, which all have equally many."""
    layers, chunks = lm.config.num_hidden_layers // lm.layout.stages, lm.virtual_stages
    if layers % chunks:
        raise UserError(
            f"the {layers} layers of each of the {lm.layout.stages} stages do not divide over train.virtual_stages = "
            f"{chunks}; the nearest sizes that work: {_nearest_divisors(layers, chunks)}"
        )


def _nearest_divisors(number: int, ways: int) -> str:
    """Those next to `ways`, which is none."""
    below = max(n for n in range(1, ways) if number % n == 0)
    above = next((n for n in range(ways + 1, number + 1) if number % n == 0), None)
    return f"{below}{'' if above is None else f' and {above}'}"
