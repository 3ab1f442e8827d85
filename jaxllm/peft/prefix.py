"""Prefix tuning (Li and Liang, arXiv 2101.00190): keys and values in front of every document, in each layer."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import PositiveInt, model_validator

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.nn.prefix import FOLDER, projected_prefix
from jaxllm.peft.base import METHODS, SharedPart
from jaxllm.peft.files import ADAPTERS, StoredAdapter, Take
from jaxllm.peft.prompt import TENSOR, VirtualTokens, uniform

KEYS, VALUES = "layers/attn/prefix_k", "layers/attn/prefix_v"


class PrefixTuning(VirtualTokens, StoredAdapter):
    """Keys and values of virtual tokens train. Names and meanings are those of HF PEFT's PrefixTuningConfig."""

    type: Literal["prefix_tuning"]
    prefix_projection: bool = False
    """whether they train through an encoder of two layers, which all layers of the model share the first of"""
    encoder_hidden_size: PositiveInt | None = None
    """its width; default: that of a layer's keys"""

    peft_type: ClassVar[str] = "PREFIX_TUNING"

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

    def add(self, lm: LM) -> LM:
        lm = super().add(lm)
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
        return replace(lm, extra={**lm.extra, **extra}, prefix_tokens=n)

    def computes(self, lm: LM) -> Any:
        return super().computes(lm), self.prefix_projection

    def description(self, lm: LM) -> dict[str, Any]:
        c = lm.config
        return {
            **super().description(lm),
            "num_attention_heads": c.num_key_value_heads,
            "token_dim": c.num_key_value_heads * c.head_dim,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size,
        }

    def tensors(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`[n, layers · 2 · size]`: of each virtual token the keys and values of every layer, what an encoder makes of
        them where there is one."""
        if self.prefix_projection:
            keys, values = map(np.asarray, projected_prefix(tree.insert({}, leaves)[FOLDER]))
        else:
            keys, values = leaves[KEYS], leaves[VALUES]
        together = np.stack([keys, values], axis=1)  # [L, 2, n, size]
        return {TENSOR: np.ascontiguousarray(together.transpose(2, 0, 1, 3)).reshape(self.num_virtual_tokens, -1)}

    def leaves(self, lm: LM, take: Take) -> dict[str, np.ndarray]:
        keys = tree.flatten(lm.abstract())[KEYS]
        layers, n, size = keys.shape
        tensor = take(TENSOR, (n, layers * 2 * size)).reshape(n, layers, 2, size).transpose(1, 2, 0, 3)
        return {path: tensor[:, i].astype(keys.dtype) for i, path in enumerate((KEYS, VALUES))}


METHODS.add("prefix_tuning", PrefixTuning)
ADAPTERS.add("PREFIX_TUNING", PrefixTuning)
