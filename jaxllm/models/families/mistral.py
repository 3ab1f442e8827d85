"""Mistral (Jiang et al., arXiv 2310.06825): a Llama without biases, whose tokens see a window of those before."""

from typing import Literal

from pydantic import PositiveInt

from jaxllm.kernels.attention_spec import AttentionSpec
from jaxllm.models.families.llama import LlamaBlock, unfused_rules
from jaxllm.models.family import FAMILIES, Family
from jaxllm.models.gated import GatedConfig


class MistralConfig(GatedConfig):
    """The shape of a Mistral."""

    type: Literal["mistral"] = "mistral"
    sliding_window: PositiveInt | None = None
    """tokens that a token sees, itself one of them; all earlier ones where it is absent"""

    @property
    def attention(self) -> AttentionSpec:
        return AttentionSpec(window=self.sliding_window)


FAMILIES.add(
    "mistral",
    Family(
        config=MistralConfig,
        block=LlamaBlock,
        rules=unfused_rules,
        model_type="mistral",
        architectures=("MistralForCausalLM",),
        # Those of transformers' MistralConfig: Mistral 7B 0.1.
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        # The window's name in MLC LLM.
        ignored={"attention_dropout": (0.0,), "sliding_window_size": (4096,)},
    ),
)
