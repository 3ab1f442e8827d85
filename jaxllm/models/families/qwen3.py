"""Qwen3 (Qwen Team, arXiv 2505.09388): a Llama that normalises the queries and keys of each head before they turn."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxllm.models.families.llama import LAYER, GatedConfig, LlamaBlock, unfused_rules
from jaxllm.models.family import FAMILIES, Family
from jaxllm.models.rules import Rule


class Qwen3Config(GatedConfig):
    """The shape of a Qwen3."""

    type: Literal["qwen3"] = "qwen3"
    attention_bias: bool = False
    """whether the attention's projections have biases"""


def rules(config: Qwen3Config) -> tuple[Rule, ...]:
    """The weight table of Hugging Face's Qwen3ForCausalLM."""
    norms = (Rule(f"layers/attn/{x}_norm/scale", f"{LAYER}self_attn.{x}_norm.weight") for x in "qk")
    return (*unfused_rules(config, config.attention_bias, config.attention_bias), *norms)


def no_window(value: Any, raw: Mapping[str, Any]) -> bool:
    """A window and where it begins mean nothing where it is switched off, as by default."""
    del value
    return not raw.get("use_sliding_window")


FAMILIES.add(
    "qwen3",
    Family(
        config=Qwen3Config,
        block=lambda c, dtype: LlamaBlock(c, dtype, c.attention_bias, c.attention_bias, qk_norm=True),
        rules=rules,
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
        },
        ignored={
            "attention_dropout": (0.0,),
            "sliding_window": no_window,
            "max_window_layers": no_window,
            "layer_types": lambda value, raw: isinstance(value, list) and {*value} <= {"full_attention"},
        },
    ),
)
