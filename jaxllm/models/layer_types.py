"""Configs whose layers see all earlier tokens or a window of them, each by its type."""

from typing import Annotated, Literal

import jax.numpy as jnp
from pydantic import Field, PositiveInt, model_validator

from jaxllm.models.gated import GatedConfig
from jaxllm.nn.context import LayerData

LayerType = Literal["full_attention", "sliding_attention"]
# A window that is no limit, and leaves room for the sum of a window and a position.
ALL = 2**30


class LayerTypesConfig(GatedConfig):
    """The shape of blocks some of which have a window."""

    sliding_window: PositiveInt | None = None
    """tokens that a token sees in layers with a window, itself one of them"""
    layer_types: Annotated[tuple[LayerType, ...], Field(strict=False)] = ()
    """full_attention or sliding_attention of each layer; default: as the family has them"""

    @model_validator(mode="after")
    def _typed_layers(self) -> "LayerTypesConfig":
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries and num_hidden_layers is {self.num_hidden_layers}; "
                "give one for each layer, or leave layer_types out"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, which needs a sliding_window")
        return self


def windows(config: LayerTypesConfig) -> LayerData:
    """The window of each layer; nothing where none has one."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(sliding):
        return LayerData()
    window = min(config.sliding_window or ALL, ALL)
    return LayerData(window=jnp.asarray([window if own else ALL for own in sliding], jnp.int32))
