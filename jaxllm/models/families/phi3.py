"""Phi-3 and Phi-4 (Abdin et al., arXiv 2404.14219 and 2412.08905): a Llama whose queries, keys and values come of one
matrix, as do the feed-forward layer's gate and what it gates. In Phi-4-mini a part of each head does not turn."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from jaxllm.kernels.attention_spec import AttentionSpec
from jaxllm.models.families.llama import LAYER, LlamaBlock, outer_rules
from jaxllm.models.family import FAMILIES, Family
from jaxllm.models.gated import GatedConfig
from jaxllm.models.rules import Interleaved, Rule, T
from jaxllm.nn.rope import Rotation


class Phi3Config(GatedConfig):
    """The shape of a Phi-3."""

    type: Literal["phi3"] = "phi3"
    sliding_window: PositiveInt | None = None
    """tokens that a token sees, itself one of them; all earlier ones where it is absent"""
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    """the share of a head that turns, its first part"""

    @property
    def rotation(self) -> Rotation:
        return super().rotation._replace(width=int(self.head_dim * self.partial_rotary_factor))

    @property
    def attention(self) -> AttentionSpec:
        return AttentionSpec(window=self.sliding_window)

    @model_validator(mode="after")
    def _turns_pairs(self) -> "Phi3Config":
        if (width := self.rotation.width) % 2 or not width:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} rotates {width} of the {self.head_dim} numbers of "
                "a head. Rotary embedding rotates pairs, so this number must be even and above 0; choose another "
                "partial_rotary_factor"
            )
        return self


def hf_rules(config: Phi3Config) -> tuple[Rule, ...]:
    """The weight table of Hugging Face's Phi3ForCausalLM."""
    c = config
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    of_keys = c.num_key_value_heads * c.head_dim
    qkv = Interleaved((c.num_attention_heads * c.head_dim, of_keys, of_keys), c.num_key_value_heads)
    gate_up = Interleaved((c.intermediate_size, c.intermediate_size), c.intermediate_size)
    return (
        *outer_rules(c),
        Rule("layers/attn/qkv/kernel", attention + "qkv_proj.weight", qkv),
        Rule("layers/attn/o/kernel", attention + "o_proj.weight", T),
        Rule("layers/mlp/gate_up/kernel", mlp + "gate_up_proj.weight", gate_up),
        Rule("layers/mlp/down/kernel", mlp + "down_proj.weight", T),
    )


FAMILIES.add(
    "phi3",
    Family(
        config=Phi3Config,
        block=lambda config, dtype: LlamaBlock(config, dtype, fused=True),
        rules=hf_rules,
        model_type="phi3",
        architectures=("Phi3ForCausalLM",),
        # Those of transformers' Phi3Config: Phi-3 mini.
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
        },
        ignored={
            # Dropout of training is the run's to choose.
            **dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop"), (0.0,)),
            # Of Phi-4-mini, whose layers all attend alike; transformers reads neither.
            **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
        },
        # As transformers takes them, of the first Phi-3 with 128k tokens.
        rope_names={"su": "longrope", "yarn": "longrope"},
    ),
)
