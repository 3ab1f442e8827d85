"""Gemma 2 (Gemma Team, arXiv 2408.00118): a norm before and behind each sublayer, caps on scores and logits, and a
window in every other layer."""

from typing import Any, Literal

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from pydantic import PositiveFloat, PositiveInt, model_validator

from jaxllm.kernels.attention_spec import AttentionSpec
from jaxllm.models.families.llama import unfused_rules
from jaxllm.models.family import FAMILIES, Family, Output
from jaxllm.models.layer_types import LayerTypesConfig, windows
from jaxllm.nn.attention import Attention
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Context
from jaxllm.nn.embed import Embed
from jaxllm.nn.head import Head
from jaxllm.nn.mlp import GatedMLP
from jaxllm.nn.norm import RMSNorm


class Gemma2Config(LayerTypesConfig):
    """The shape of a Gemma 2. `layer_types` defaults to a window in every other layer, the first included."""

    type: Literal["gemma2"] = "gemma2"
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"] = "gelu_pytorch_tanh"
    """activation of the feed-forward layer's gate"""
    tie_word_embeddings: bool = True
    """whether the output matrix is the embedding"""
    query_pre_attn_scalar: PositiveInt = 256
    """scores of attention are divided by its square root"""
    attn_logit_softcapping: PositiveFloat | None = 50.0
    """the largest score of attention"""
    final_logit_softcapping: PositiveFloat | None = 30.0
    """the largest logit"""

    @property
    def attention(self) -> AttentionSpec:
        return AttentionSpec(scale=self.query_pre_attn_scalar**-0.5, soft_cap=self.attn_logit_softcapping)

    @model_validator(mode="before")
    @classmethod
    def _alternating(cls, values: Any) -> Any:
        layers = values.get("num_hidden_layers") if isinstance(values, dict) else None
        if type(layers) is not int or not 0 < layers <= 2**16 or values.get("layer_types") is not None:
            return values
        kinds = ("sliding_attention", "full_attention")
        return {**values, "layer_types": tuple(kinds[i % 2] for i in range(layers))}


class Gemma2Block(nn.Module):
    """`x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))`."""

    config: Gemma2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        """`[B, T, D]` → `[B, T, D]`."""
        c = self.config

        def norm(x: jax.Array, name: str) -> jax.Array:
            return RMSNorm(c.rms_norm_eps, around_one=True, name=name)(x)

        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        attention = Attention(*heads, c.initializer_range, self.dtype, spec=c.attention, name="attn")
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, False, c.initializer_range, self.dtype, name="mlp")
        y, cache = attention(norm(x, "attn_norm"), ctx, cache)
        y = ctx.drop(norm(y, "attn_out_norm"), 0)
        x = ctx.layout.constrain(x + y, "batch", "act_length", "act_embed")
        y = ctx.drop(norm(mlp(norm(x, "mlp_norm"), ctx), "mlp_out_norm"), 1)
        return Output(ctx.layout.constrain(x + y, "batch", "act_length", "act_embed"), cache=cache)


NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def embedding(config: Gemma2Config, dtype: DTypeLike) -> nn.Module:
    """The rows of a table, as long as the residual stream is wide."""
    c = config
    return Embed(c.vocab_size, c.hidden_size, dtype, c.initializer_range, scale=c.hidden_size**0.5)


def head(config: Gemma2Config, dtype: DTypeLike) -> nn.Module:
    """The output matrix, and the cap of the logits."""
    del dtype
    c = config
    return Head(c.vocab_size, c.initializer_range, c.tie_word_embeddings, soft_cap=c.final_logit_softcapping)


FAMILIES.add(
    "gemma2",
    Family(
        config=Gemma2Config,
        block=Gemma2Block,
        rules=lambda c: unfused_rules(c, norms=NORMS),
        embed=embedding,
        norm=lambda c, dtype: RMSNorm(c.rms_norm_eps, around_one=True),
        head=head,
        layer_data=windows,
        model_type="gemma2",
        architectures=("Gemma2ForCausalLM",),
        names={"hidden_act": "hidden_activation"},
        # Those of transformers' Gemma2Config: Gemma 2 2B, but for query_pre_attn_scalar.
        defaults={
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        ignored={
            "attention_dropout": (0.0,),
            "use_bidirectional_attention": (False,),
            # Older names of what is there beside them.
            "hidden_act": lambda value, raw: value == raw.get("hidden_activation", "gelu_pytorch_tanh"),
            "sliding_window_size": lambda value, raw: value == raw.get("sliding_window", 4096),
        },
    ),
)
