"""What a model family is: its config, its block, and how Hugging Face writes both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import flax.linen as nn
from jax.typing import DTypeLike
from pydantic import AfterValidator, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from jaxllm.core.config import ByType, Section
from jaxllm.core.registry import Registry
from jaxllm.models.rules import Rule
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
    rms_norm_eps: NonNegativeFloat = 1e-5
    """added to the mean square in a norm"""
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
        longest = self.rope.longest(self.rotation)
        return longest if self.longest_row is None else min(longest, self.longest_row)

    @property
    def longest_row(self) -> int | None:
        """The tokens of the longest row that is computed as the model means it; None for any."""
        return None

    @model_validator(mode="after")
    def _defined_rope(self) -> "FamilyConfig":
        self.rope.check(self.rotation)
        return self


@dataclass(frozen=True)
class Family:
    """One architecture: its config, its block, and how Hugging Face writes both.

    block: `(config, compute dtype) -> nn.Module`, whose call is `(x, ctx, cache) -> (x, cache)`.
    rules: the weight table of a config.
    model_type, architecture: what `config.json` calls it.
    defaults: what a field that is absent from `config.json` means, which is not always our own default.
    neutral: fields of `config.json` that this code does not implement, each with the values under which they
        change nothing; any other value is refused by name.
    rope_names: further names of the kinds of rope in its `config.json`.
    """

    config: type[FamilyConfig]
    block: Callable[[Any, DTypeLike], nn.Module]
    rules: Callable[[Any], tuple[Rule, ...]]
    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_names: Mapping[str, str] = field(default_factory=dict)


FAMILIES = Registry[Family]("model family")
