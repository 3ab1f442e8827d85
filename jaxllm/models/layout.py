"""Fitting a layout to the heads of a model."""

import logging

from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.models.base import FamilyConfig

log = logging.getLogger(__name__)


def fit_layout(config: FamilyConfig, layout: Layout) -> Layout:
    """`layout`, with the key and value heads replicated where they do not divide over the tensor axis.

    Raises UserError if the query heads do not: a head is never cut in two.
    """
    ways, heads = layout.size("act_heads"), config.num_attention_heads
    if heads % ways:
        below = max(n for n in range(1, ways) if heads % n == 0)
        above = next((n for n in range(ways + 1, heads + 1) if heads % n == 0), None)
        raise UserError(
            f"the {heads} attention heads of the model do not divide over mesh.tensor = {ways}; the nearest "
            f"sizes that work: {below}{'' if above is None else f' and {above}'}"
        )
    kv_heads, kv_ways = config.num_key_value_heads, layout.size("act_kv_heads")
    if kv_heads % kv_ways == 0:
        return layout
    log.info("%d key-value heads over mesh.tensor = %d: every device holds all of them", kv_heads, kv_ways)
    return layout.replace(kv_heads=(), act_kv_heads=())
