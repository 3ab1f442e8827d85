"""What a model family is: its config, the modules of its model, and how Hugging Face writes both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import flax.linen as nn
from jax.typing import DTypeLike
from pydantic import AfterValidator, PositiveFloat, PositiveInt, model_validator

from jaxllm.core.config import ByType, Section
from jaxllm.core.registry import Registry
from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec
from jaxllm.models.rules import Rule
from jaxllm.models.stack import Output as Output  # what the calls of blocks return
from jaxllm.nn.context import LayerData
from jaxllm.nn.embed import Embed
from jaxllm.nn.head import Head
from jaxllm.nn.norm import RMSNorm
from jaxllm.nn.rope import ROPES, DefaultRope, Rope, Rotation


def _at_most(limit: int, largest: str) -> AfterValidator:
    """The bound of a size: what is far beyond the largest model is a slip, and would run until memory is gone."""

    def check(value: int) -> int:
        if value > limit:
            raise ValueError(f"must be at most {limit:,}, and is a slip beyond that: the largest models have {largest}")
        return value

    return AfterValidator(check)


Layers = Annotated[PositiveInt, _at_most(2_000, "1,000 layers")]
Heads = Annotated[PositiveInt, _at_most(2**16, "hundreds of heads")]
HeadWidth = Annotated[PositiveInt, _at_most(2**13, "heads of 576")]
Width = Annotated[PositiveInt, _at_most(2**20, "a width below 100,000")]
Tokens = Annotated[PositiveInt, _at_most(2**24, "some 260,000 tokens")]


class FamilyConfig(Section):
    """What every family has, under the names of Hugging Face configs."""

    type: str
    vocab_size: Tokens
    """tokens that the embedding knows"""
    hidden_size: Width
    """width of the residual stream"""
    num_hidden_layers: Layers
    """blocks"""
    num_attention_heads: Heads
    """query heads"""
    num_key_value_heads: Heads
    """key and value heads, shared by groups of query heads"""
    head_dim: HeadWidth
    """width of a head"""
    max_position_embeddings: PositiveInt = 2048
    """the longest sequence that the model is meant for"""
    rope_theta: PositiveFloat = 10000.0
    """base of the rotation angles"""
    rope: Annotated[Rope, ByType(ROPES)] = DefaultRope()
    tie_word_embeddings: bool = False
    """whether the output matrix is the embedding"""
    initializer_range: PositiveFloat = 0.02
    """standard deviation of new weights"""

    @property
    def rotation(self) -> Rotation:
        """What the rotary embedding follows from besides its kind."""
        return Rotation(self.head_dim, self.rope_theta, self.max_position_embeddings)

    @property
    def longest(self) -> int:
        """The tokens of the longest text that the model is meant for."""
        return self.rope.longest(self.rotation)

    @property
    def attention(self) -> AttentionSpec:
        """What the attention of every layer computes; a window that `layer_data` has takes the place of its own."""
        return PLAIN

    @model_validator(mode="after")
    def _defined_rope(self) -> "FamilyConfig":
        self.rope.check(self.rotation)
        return self


def token_embedding(config: Any, dtype: DTypeLike) -> nn.Module:
    """The rows of a table."""
    return Embed(config.vocab_size, config.hidden_size, dtype, config.initializer_range)


def rms_norm(config: Any, dtype: DTypeLike) -> nn.Module:
    """The norm in front of the head."""
    del dtype  # a norm returns the dtype that it is given
    return RMSNorm(config.rms_norm_eps)


def linear_head(config: Any, dtype: DTypeLike) -> nn.Module:
    """The output matrix, which is the embedding's table where they are tied."""
    del dtype  # logits have at least float32
    return Head(config.vocab_size, config.initializer_range, config.tie_word_embeddings)


def equal_layers(config: Any) -> LayerData:
    """Layers that differ in nothing but their parameters."""
    del config
    return LayerData()


Ignored = tuple[Any, ...] | Callable[[Any, Mapping[str, Any]], bool]


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture: its config, the modules of its model, and how Hugging Face writes both.

    block, embed, norm, head: `(config, compute dtype) -> nn.Module`. Their calls are `block(x, ctx, cache) -> Output`,
        `embed(tokens, ctx) -> x`, `norm(x) -> x` and `head(x, embed's parameters) -> logits`. The config that `embed`
        and `head` get has the vocabulary as it is in memory, which some meshes pad.
    rules: the weight table of a config.
    layer_data: what differs between its layers besides their parameters.
    model_type, architectures: what `config.json` calls it; the first of `architectures` is written.
    names: the names of fields in `config.json`, where they differ from ours: ours → theirs.
    defaults: by our names, what a field that is absent from `config.json` means, which is not always our own default.
    ignored: by their names, the fields of `config.json` that this code does not implement: for each the values under
        which it changes nothing, or a predicate `(value, whole config.json) -> bool` that says so. Any other value is
        refused by name.
    rope_names: further names of the kinds of rope in its `config.json`.
    """

    config: type[FamilyConfig]
    block: Callable[[Any, DTypeLike], nn.Module]
    rules: Callable[[Any], tuple[Rule, ...]]
    model_type: str
    architectures: tuple[str, ...]
    embed: Callable[[Any, DTypeLike], nn.Module] = token_embedding
    norm: Callable[[Any, DTypeLike], nn.Module] = rms_norm
    head: Callable[[Any, DTypeLike], nn.Module] = linear_head
    layer_data: Callable[[Any], LayerData] = equal_layers
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, Ignored] = field(default_factory=dict)
    rope_names: Mapping[str, str] = field(default_factory=dict)

    def name(self, field: str) -> str:
        """What `config.json` calls our `field`."""
        return self.names.get(field, field)


FAMILIES = Registry[Family]("model family")
