"""Prefix tuning (Li and Liang, arXiv 2101.00190): keys and values in front of every document, in each layer."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import PositiveInt, model_validator

from jaxllm.core import tree
from jaxllm.core.config import Conflict
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.mesh import MeshConfig
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.nn.prefix import FOLDER, projected_prefix
from jaxllm.peft import keys, virtual_tokens
from jaxllm.peft.base import ADAPTERS, METHODS, PeftConfig, SharedPart
from jaxllm.peft.files import AdapterFiles, Part
from jaxllm.peft.virtual_tokens import check_room, uniform

KEYS, VALUES = "layers/attn/prefix_k", "layers/attn/prefix_v"


class PrefixTuning(PeftConfig):
    """Keys and values of virtual tokens train. Names and meanings are those of HF PEFT's PrefixTuningConfig."""

    type: Literal["prefix_tuning"]
    num_virtual_tokens: keys.NumVirtualTokens = 20
    prefix_projection: bool = False
    """whether they train through an encoder of two layers, which all layers of the model share the first of"""
    encoder_hidden_size: PositiveInt | None = None
    """its width; default: that of a layer's keys"""

    files: ClassVar[AdapterFiles] = virtual_tokens.files("PREFIX_TUNING")
    merges: ClassVar[bool] = False

    @model_validator(mode="after")
    def _encodes(self) -> "PrefixTuning":
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is of the encoder, and prefix_projection is false; set it to true")
        return self

    @property
    def shared_part(self) -> SharedPart | None:
        if not self.prefix_projection:
            return None
        return SharedPart(
            "peft.prefix_projection has an encoder that all layers share", without="prefix_projection to false"
        )

    def conflicts_with_mesh(self, mesh: MeshConfig) -> Iterator[Conflict]:
        return virtual_tokens.context_conflicts(self.type, mesh)

    def settings(self) -> Mapping[str, Any]:
        return {"prefix_tokens": self.num_virtual_tokens}

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        check_room(self.type, self.num_virtual_tokens, lm)
        c, n = lm.config, self.num_virtual_tokens
        layers, size = c.num_hidden_layers, c.num_key_value_heads * c.head_dim
        dtype = at_least_float32(tree.at(lm.abstract(), "embed/table").dtype)
        if self.prefix_projection:
            hidden = self.encoder_hidden_size or size

            def normal(key: jax.Array, _: Any) -> jax.Array:
                return jax.random.normal(key, (n, size), dtype)

            extra = {
                f"{FOLDER}/embedding": ExtraLeaf((None, None), normal),
                f"{FOLDER}/hidden/kernel": uniform((size, hidden), 1 / math.sqrt(size), dtype),
                f"{FOLDER}/hidden/bias": uniform((hidden,), 1 / math.sqrt(size), dtype),
            }
            bound = 1 / math.sqrt(hidden)
            for name in ("k", "v"):
                extra[f"{FOLDER}/{name}/kernel"] = uniform((layers, hidden, size), bound, dtype)
                extra[f"{FOLDER}/{name}/bias"] = uniform((layers, size), bound, dtype)
        else:

            def draw(key: jax.Array, _: Any) -> jax.Array:
                return jax.random.normal(key, (layers, n, size), dtype)

            extra = {path: ExtraLeaf(("layers", None, "kv_heads"), draw) for path in (KEYS, VALUES)}
        return extra

    def computes(self, lm: LM) -> Any:
        return super().computes(lm), self.prefix_projection

    def finished(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not self.prefix_projection:
            return leaves
        keys_and_values = projected_prefix(tree.insert({}, leaves)[FOLDER])
        return {path: np.asarray(leaf) for path, leaf in zip((KEYS, VALUES), keys_and_values, strict=True)}

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        c = lm.config
        return {
            **super().description(lm, leaves),
            **virtual_tokens.description(lm),
            "num_attention_heads": c.num_key_value_heads,
            "token_dim": c.num_key_value_heads * c.head_dim,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size,
        }

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        """Of one tensor `[n, layers · 2 · size]`: for each virtual token the keys and the values of every layer."""
        layers, n = lm.config.num_hidden_layers, self.num_virtual_tokens
        size = lm.config.num_key_value_heads * lm.config.head_dim
        return [
            Part(
                path,
                (layer,),
                virtual_tokens.TENSOR,
                (n, layers * 2 * size),
                within=(slice(n), slice((2 * layer + half) * size, (2 * layer + half + 1) * size)),
            )
            for layer in range(layers)
            for half, path in enumerate((KEYS, VALUES))
        ]


METHODS.add("prefix_tuning", PrefixTuning)
ADAPTERS.add("PREFIX_TUNING", PrefixTuning)
