"""Llama (Touvron et al., arXiv 2302.13971 and 2307.09288) and every model of its shape."""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from jaxllm.models.family import FAMILIES, Family, Output
from jaxllm.models.gated import GatedConfig
from jaxllm.models.rules import Rule, T
from jaxllm.nn.attention import Attention
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import Context
from jaxllm.nn.mlp import GatedMLP
from jaxllm.nn.norm import RMSNorm


class LlamaConfig(GatedConfig):
    """The shape of a Llama."""

    type: Literal["llama"] = "llama"
    attention_bias: bool = False
    """whether the attention's projections have biases"""
    mlp_bias: bool = False
    """whether the feed-forward layer's have"""


class LlamaBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    qkv_bias, o_bias, mlp_bias: which projections have biases. fused: whether queries, keys and values come of one
    matrix, and so do the feed-forward layer's gate and what it gates. qk_norm: whether the queries and keys of each
    head are normalised.
    """

    config: GatedConfig
    dtype: DTypeLike
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        """`[B, T, D]` → `[B, T, D]`."""
        c = self.config
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.initializer_range,
            self.dtype,
            self.qkv_bias,
            self.o_bias,
            self.fused,
            c.rms_norm_eps if self.qk_norm else None,
            c.attention,
            name="attn",
        )
        mlp = GatedMLP(
            c.intermediate_size, c.hidden_act, self.mlp_bias, c.initializer_range, self.dtype, self.fused, name="mlp"
        )
        y, cache = attention(RMSNorm(c.rms_norm_eps, name="attn_norm")(x), ctx, cache)
        x = ctx.layout.constrain(x + ctx.drop(y, 0), "batch", "act_length", "act_embed")
        y = mlp(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x), ctx)
        return Output(ctx.layout.constrain(x + ctx.drop(y, 1), "batch", "act_length", "act_embed"), cache=cache)


LAYER = "model.layers.{i}."


# Ours → those of the file.
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def outer_rules(config: GatedConfig, norms: Mapping[str, str] = NORMS) -> list[Rule]:
    """The weight table of Hugging Face's LlamaForCausalLM but for attention and feed-forward layers."""
    tied = config.tie_word_embeddings
    table = Rule("embed/table", "model.embed_tokens.weight", alias="lm_head.weight" if tied else None, vocab_axis=0)
    rules = [table, Rule("norm/scale", "model.norm.weight")]
    if not tied:
        rules.append(Rule("head/kernel", "lm_head.weight", T, vocab_axis=1))
    return rules + [Rule(f"layers/{ours}/scale", f"{LAYER}{theirs}.weight") for ours, theirs in norms.items()]


def unfused_rules(
    config: GatedConfig,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    norms: Mapping[str, str] = NORMS,
) -> tuple[Rule, ...]:
    """The weight table of a model with a matrix for each projection, and biases where they are asked for."""
    rules = outer_rules(config, norms)
    groups = (
        ("attn", "self_attn", ("q", "k", "v"), qkv_bias),
        ("attn", "self_attn", ("o",), o_bias),
        ("mlp", "mlp", ("gate", "up", "down"), mlp_bias),
    )
    for ours, theirs, names, bias in groups:
        for name in names:
            rules.append(Rule(f"layers/{ours}/{name}/kernel", f"{LAYER}{theirs}.{name}_proj.weight", T))
            if bias:
                rules.append(Rule(f"layers/{ours}/{name}/bias", f"{LAYER}{theirs}.{name}_proj.bias"))
    return tuple(rules)


FAMILIES.add(
    "llama",
    Family(
        config=LlamaConfig,
        block=lambda c, dtype: LlamaBlock(c, dtype, c.attention_bias, c.attention_bias, c.mlp_bias),
        rules=lambda c: unfused_rules(c, c.attention_bias, c.attention_bias, c.mlp_bias),
        model_type="llama",
        architectures=("LlamaForCausalLM",),
        # Those of transformers' LlamaConfig: Llama 2 7B.
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
        },
        ignored={"attention_dropout": (0.0,), "is_llama_config": (True,), "rope_interleaved": (False,)},
    ),
)
