"""Qwen3 (Qwen Team, arXiv 2505.09388): a Llama that normalises the queries and keys of each head before they turn."""

from typing import Any, Literal

from pydantic import NonNegativeInt, model_validator

from jaxllm.models.families.llama import LAYER, LlamaBlock, unfused_rules
from jaxllm.models.family import FAMILIES, Family
from jaxllm.models.layer_types import LayerTypesConfig, windows
from jaxllm.models.rules import Rule


class Qwen3Config(LayerTypesConfig):
    """The shape of a Qwen3. `layer_types` defaults to a window from layer `max_window_layers` on, where it is used."""

    type: Literal["qwen3"] = "qwen3"
    attention_bias: bool = False
    """whether the attention's projections have biases"""
    use_sliding_window: bool = False
    """whether sliding_window is used"""
    max_window_layers: NonNegativeInt = 28
    """number of layers at the start that have no window"""

    @model_validator(mode="before")
    @classmethod
    def _last_layers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kinds, used = values.get("layer_types"), values.get("use_sliding_window")
        if isinstance(kinds, list | tuple) and "sliding_attention" in kinds and not used:
            raise ValueError("layer_types has sliding_attention and use_sliding_window is false; set it to true")
        window = values.get("sliding_window") if used else None
        values, layers = {**values, "sliding_window": window}, values.get("num_hidden_layers")
        if type(layers) is int and 0 < layers <= 2**16 and kinds is None:
            first = layers if window is None else values.get("max_window_layers", 28)
            names = ("full_attention", "sliding_attention")
            values["layer_types"] = tuple(names[type(first) is int and i >= first] for i in range(layers))
        return values


def rules(config: Qwen3Config) -> tuple[Rule, ...]:
    """The weight table of Hugging Face's Qwen3ForCausalLM."""
    norms = (Rule(f"layers/attn/{x}_norm/scale", f"{LAYER}self_attn.{x}_norm.weight") for x in "qk")
    return (*unfused_rules(config, config.attention_bias, config.attention_bias), *norms)


FAMILIES.add(
    "qwen3",
    Family(
        config=Qwen3Config,
        block=lambda c, dtype: LlamaBlock(c, dtype, c.attention_bias, c.attention_bias, qk_norm=True),
        rules=rules,
        layer_data=windows,
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        # Those of transformers' Qwen3Config.
        defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        ignored={"attention_dropout": (0.0,)},
    ),
)
