"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form of Hugging Face weights.

Pair i of a head turns by the angle position · f_i, and a kind of rope says what its frequencies f_i are: the plain
ones, θ^(-2i / width), or the frequencies of an extension to longer texts. The kinds, their keys and what they compute
follow transformers 5 (`modeling_rope_utils`). The width is the head's, or the width of its first part where the rest of
the head does not turn.
"""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from jaxllm.core.config import Section
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.registry import Registry

# Strict again for what stands in the list: a list in YAML or JSON may fill this tuple.
PositiveFloats = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]


class Rotation(NamedTuple):
    """What a model says of its rotation: the width of the part of a head that turns, θ, and the length that the model
    is meant for."""

    width: int
    theta: float
    max_positions: int

    def exponents(self) -> np.ndarray:
        """2i / width of each pair."""
        return np.arange(0, self.width, 2) / self.width

    def plain(self) -> np.ndarray:
        """θ^(-2i / width) of each pair."""
        return self.theta ** -self.exponents()


class Rope(Section):
    """How positions become angles. by_length: whether the angles depend on how long the document is."""

    type: str
    by_length: ClassVar[bool] = False

    def check(self, rotation: Rotation) -> None:
        """Raises ValueError where this kind is undefined for a model."""

    @abstractmethod
    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        """f_i `[width / 2]`; or `[B, T or 1, width / 2]`, for documents of `lengths` `[B, T or 1]`."""

    def amplitude(self, rotation: Rotation) -> float:
        """What cosines and sines are multiplied by, and so the attention's scores twice."""
        return 1.0

    def longest(self, rotation: Rotation) -> int:
        """The tokens of the longest text that the model is meant for."""
        return rotation.max_positions


class DefaultRope(Rope):
    """The plain angles, position · θ^(-2i / width)."""

    type: Literal["default"] = "default"

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        return rotation.plain()


class LinearRope(Rope):
    """Position interpolation (Chen et al., arXiv 2306.15595, eq. 4): positions are divided by `factor`."""

    type: Literal["linear"] = "linear"
    factor: float = Field(ge=1)
    """what positions are divided by"""

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        return rotation.plain() / self.factor


class DynamicRope(Rope):
    """Dynamic NTK scaling (Peng et al., arXiv 2309.00071, section 3.3), in the form of transformers.

    A document of length l above L = max_position_embeddings has the base θ·(factor·l/L − factor + 1)^(d / (d − 2)).
    """

    type: Literal["dynamic"] = "dynamic"
    by_length: ClassVar[bool] = True
    factor: float = Field(ge=1)
    """how fast the base grows with the length beyond max_position_embeddings"""

    def check(self, rotation: Rotation) -> None:
        if rotation.width <= 2:
            raise ValueError("rope type dynamic needs a head_dim above 2")

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        ratio = jnp.maximum(lengths, rotation.max_positions)[..., None] / rotation.max_positions
        growth = (self.factor * ratio - (self.factor - 1)) ** (rotation.width / (rotation.width - 2))
        return (rotation.theta * growth) ** -jnp.asarray(rotation.exponents(), growth.dtype)

    def longest(self, rotation: Rotation) -> int:
        """Here max_position_embeddings is the length before it was extended."""
        return int(self.factor * rotation.max_positions)


class Llama3Rope(Rope):
    """Llama 3.1 (arXiv 2407.21783; `apply_scaling` of its reference code).

    With L = original_max_position_embeddings, a pair that turns less than low_freq_factor times in L tokens is
    divided by factor, one that turns more than high_freq_factor times is left, those between are blended.
    """

    type: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    """what the frequencies of slow pairs are divided by"""
    low_freq_factor: PositiveFloat
    """pairs with fewer turns than this in the original length are slow"""
    high_freq_factor: PositiveFloat
    """pairs with more turns than this are left as they are"""
    original_max_position_embeddings: PositiveInt
    """the length before it was extended"""

    def check(self, rotation: Rotation) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope.high_freq_factor {self.high_freq_factor} must be above rope.low_freq_factor "
                f"{self.low_freq_factor}"
            )

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        plain = rotation.plain()
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(blend, 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


class YarnRope(Rope):
    """YaRN (Peng et al., arXiv 2309.00071): frequencies by parts (section 3.2) and scaled scores (section 3.4)."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    """what the frequencies of slow pairs are divided by"""
    original_max_position_embeddings: PositiveInt
    """the length before it was extended"""
    attention_factor: PositiveFloat | None = None
    """what cosines and sines are multiplied by; default: 0.1 ln(factor) + 1"""
    beta_fast: PositiveFloat = 32.0
    """pairs with more turns than this in the original length are left as they are"""
    beta_slow: PositiveFloat = 1.0
    """pairs with fewer turns than this are divided by factor"""
    mscale: NonNegativeFloat | None = None
    """together with mscale_all_dim: attention_factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim …)"""
    mscale_all_dim: NonNegativeFloat | None = None
    """see mscale; each alone changes nothing, as in transformers"""
    truncate: bool = True
    """whether the bounds between fast and slow pairs are rounded outwards to whole pairs"""

    def check(self, rotation: Rotation) -> None:
        if rotation.theta <= 1:
            raise ValueError(f"rope type yarn needs a rope_theta above 1, got {rotation.theta}")

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        width, plain = rotation.width, rotation.plain()

        def pair_of(turns: float) -> float:
            """The pair that turns so many times in the original length."""
            ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(rotation.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        slow = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        return plain * (slow / self.factor + 1 - slow)

    def amplitude(self, rotation: Rotation) -> float:
        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1)


class LongRope(Rope):
    """LongRoPE (Ding et al., arXiv 2402.13753), in the form of Phi-3: each pair is slowed down by a factor of its own.

    A document longer than L = original_max_position_embeddings takes those of `long_factor`, any other those of
    `short_factor`; cosines and sines are multiplied by sqrt(1 + ln(factor) / ln(L)).
    """

    type: Literal["longrope"] = "longrope"
    by_length: ClassVar[bool] = True
    short_factor: PositiveFloats
    """what each pair's frequency is divided by, within the original length"""
    long_factor: PositiveFloats
    """the same in longer documents"""
    original_max_position_embeddings: int = Field(gt=1)
    """the length before it was extended"""
    factor: PositiveFloat | None = None
    """the extension that attention_factor is for; default: max_position_embeddings / the original length"""
    attention_factor: PositiveFloat | None = None
    """what cosines and sines are multiplied by; default: from factor"""

    def check(self, rotation: Rotation) -> None:
        for name in ("short_factor", "long_factor"):
            length, pairs = len(getattr(self, name)), rotation.width // 2
            if length != pairs:
                raise ValueError(
                    f"rope.{name} has {length} numbers and must have {pairs}, one for each pair of a head that turns"
                )

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        short, long = (rotation.plain() / np.asarray(each) for each in (self.short_factor, self.long_factor))
        return jnp.where(lengths[..., None] > self.original_max_position_embeddings, long, short)

    def amplitude(self, rotation: Rotation) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or rotation.max_positions / self.original_max_position_embeddings
        return math.sqrt(1 + math.log(max(factor, 1)) / math.log(self.original_max_position_embeddings))


class ProportionalRope(Rope):
    """The fastest `partial_rotary_factor` of the pairs turn, divided by `factor`; the others do not turn at all."""

    type: Literal["proportional"] = "proportional"
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    """the share of the pairs that turn"""
    factor: float = Field(default=1.0, ge=1)
    """what positions are divided by"""

    def frequencies(self, rotation: Rotation, lengths: jax.Array) -> ArrayLike:
        turning = int(self.partial_rotary_factor * rotation.width // 2)
        return np.where(np.arange(rotation.width // 2) < turning, rotation.plain() / self.factor, 0)


ROPES = Registry[type[Rope]]("rope type")
for _rope in (DefaultRope, LinearRope, DynamicRope, Llama3Rope, YarnRope, LongRope, ProportionalRope):
    ROPES.add(_rope.model_fields["type"].default, _rope)


def rope_tables(
    positions: jax.Array,
    rotation: Rotation,
    dtype: DTypeLike,
    rope: Rope | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, width / 2]` of the angles at `positions` `[B, T]`, in at least float32.

    rope: the kind; None = the plain angles. segments: `[B, T]`, which document each token is of; None = one a row.

    The kinds whose angles depend on the length take that of each token's own document, as far as `positions` show
    it: the largest position + 1. So a document has the same angles alone, packed or in a batch, where transformers
    takes the largest of the batch. In decoding, the positions show the text so far: as in transformers, keys in the
    cache keep the angles that they were written with.
    """
    rope, wide = rope or DefaultRope(), at_least_float32(dtype)
    lengths = document_lengths(positions, segments) if rope.by_length else positions
    frequencies = jnp.asarray(rope.frequencies(rotation, lengths.astype(wide)), wide)
    angles = positions.astype(wide)[..., None] * frequencies
    amplitude = rope.amplitude(rotation)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def document_lengths(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The largest position + 1 of the document of each token: `[B, 1]` without segments, else `[B, T]`."""
    if segments is None:
        return jnp.max(positions, axis=1, keepdims=True) + 1

    def row(positions: jax.Array, segments: jax.Array) -> jax.Array:
        document = jnp.searchsorted(jnp.sort(segments), segments)  # a number below T, whatever the ids are
        return jax.ops.segment_max(positions, document, num_segments=len(segments))[document] + 1

    return jax.vmap(row)(positions, segments)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + width / 2) of `x` `[B, T, H, head_dim]`; the result has x's dtype.

    The width, which the tables tell, may be less than head_dim: what lies behind it in each head stays as it is.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :width], tables), x[..., width:]], axis=-1)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
