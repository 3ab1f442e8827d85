"""The config of models whose blocks are attention with rotary embedding, then a gated feed-forward layer."""

from typing import Any, Literal

from pydantic import NonNegativeFloat, model_validator

from jaxllm.models.family import FamilyConfig, Width


class GatedConfig(FamilyConfig):
    """The shape of such a model. `num_key_value_heads` defaults to the query heads, `head_dim` to their even share."""

    intermediate_size: Width
    """width of the feed-forward layer"""
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"] = "silu"
    """activation of the feed-forward layer's gate"""
    rms_norm_eps: NonNegativeFloat = 1e-5
    """added to the mean square in a norm"""

    @model_validator(mode="before")
    @classmethod
    def _derived_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        # Where one of them is wrong that is said of it alone, and nothing follows from it.
        known = all(type(size) is int and 0 < size <= 2**31 for size in (heads, width))
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads if known else 1
        if values.get("head_dim") is None:
            if known and width % heads:
                raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}; set head_dim")
            values["head_dim"] = width // heads if known else 2
        return values

    @model_validator(mode="after")
    def _grouped(self) -> "GatedConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        return self
