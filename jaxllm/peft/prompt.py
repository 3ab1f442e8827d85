"""Virtual tokens in front of every document: prompt tuning (Lester et al., arXiv 2104.08691) and p-tuning (Liu et al.,
arXiv 2103.10385).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import PositiveInt, model_validator

from jaxllm.core import tree
from jaxllm.core.config import Conflict
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import MeshConfig
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.nn.prompt import virtual_tokens
from jaxllm.peft.base import METHODS
from jaxllm.peft.files import ADAPTERS, AdapterConfig, AdapterOfParts, Part

PROMPT, ENCODER = "embed/prompt", "embed/prompt_encoder"
TENSOR = "prompt_embeddings"


class VirtualTokens(AdapterConfig):
    """What the methods have that put virtual tokens in front of every document. Their files have these alone."""

    num_virtual_tokens: PositiveInt = 20
    """virtual tokens in front of every document"""

    merges: ClassVar[bool] = False
    described: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)
    inert: ClassVar[tuple[str, ...]] = (
        *("num_attention_heads", "num_layers", "token_dim", "num_transformer_submodules"),
        *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type"),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        *("prefix_projection", "init_weights"),
    )

    def conflicts_with_mesh(self, mesh: MeshConfig) -> Iterator[Conflict]:
        if mesh.context != 1:
            yield Conflict(
                f"mesh.context is {mesh.context}, whose devices have equal parts of each row, and peft.type is "
                f"{self.type}, which puts virtual tokens in front of it",
                "set context to 1, or choose another method, such as lora",
            )

    def add(self, lm: LM) -> LM:
        if lm.config.rope.by_length:
            raise UserError(
                f"peft.type is {self.type}, and the angles of the rope {lm.config.rope.type!r} depend on the length of "
                "a text, which texts that share virtual tokens do not agree on; choose another method, such as lora"
            )
        if self.num_virtual_tokens >= lm.config.longest:
            raise UserError(
                f"peft.num_virtual_tokens is {self.num_virtual_tokens}, and the model has {lm.config.longest} "
                "positions for them and the text; set it lower"
            )
        return lm

    def computes(self, lm: LM) -> Any:
        del lm
        return self.num_virtual_tokens

    def description(self, lm: LM) -> dict[str, Any]:
        c = lm.config
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "token_dim": c.hidden_size,
        }


class PromptTuning(VirtualTokens, AdapterOfParts):
    """Embeddings of virtual tokens train. Names and meanings are those of HF PEFT's PromptTuningConfig."""

    type: Literal["prompt_tuning"]
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    """what they are at the start: RANDOM, embeddings of tokens drawn at random (SAMPLE_VOCAB), or those of
    prompt_tuning_init_text (TEXT), cut or repeated to num_virtual_tokens"""
    prompt_tuning_init_text: str | None = None
    """a text to start from, such as what the model is to do"""

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    @model_validator(mode="after")
    def _has_text(self) -> "PromptTuning":
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise ValueError(
                f"prompt_tuning_init is {self.prompt_tuning_init} and prompt_tuning_init_text is "
                f"{self.prompt_tuning_init_text!r}; give TEXT and a text, or neither"
            )
        return self

    def add(self, lm: LM) -> LM:
        lm = super().add(lm)
        shape = (self.num_virtual_tokens, lm.config.hidden_size)
        dtype = at_least_float32(tree.at(lm.abstract(), "embed/table").dtype)

        def draw(key: jax.Array, params: Params) -> jax.Array:
            if self.prompt_tuning_init == "RANDOM":
                return jax.random.normal(key, shape, dtype)
            ids = jax.random.randint(key, shape[:1], 0, lm.config.vocab_size)
            return tree.at(params, "embed/table")[ids].astype(dtype)

        extra = {**lm.extra, PROMPT: ExtraLeaf((None, None), draw)}
        return replace(lm, extra=extra, prompt_tokens=self.num_virtual_tokens)

    def begun(self, lm: LM, load: Callable[[], Params], tokenize: Callable[[str], list[int]]) -> Callable[[], Params]:
        if self.prompt_tuning_init_text is None:
            return load
        ids = tokenize(self.prompt_tuning_init_text)
        if not ids:
            raise UserError("peft.prompt_tuning_init_text has no token; give it some text")
        ids = (ids * math.ceil(self.num_virtual_tokens / len(ids)))[: self.num_virtual_tokens]

        def loaded() -> Params:
            params = load()
            if PROMPT in tree.flatten(params):  # of an adapter that is trained on
                return params
            table = params["embed"]["table"]
            start = jax.jit(
                lambda table: table[np.array(ids)].astype(at_least_float32(table.dtype)),
                out_shardings=lm.layout.replicated,
            )
            return tree.insert(params, {PROMPT: start(table)})

        return loaded

    def parts(self, lm: LM) -> list[Part]:
        return [Part(PROMPT, (), TENSOR, (self.num_virtual_tokens, lm.config.hidden_size))]


class PTuning(VirtualTokens):
    """Embeddings of virtual tokens train through an encoder. Names and meanings are those of HF PEFT's
    PromptEncoderConfig."""

    type: Literal["p_tuning"]
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """the encoder: MLP (three layers) or LSTM (of both directions, and two layers)"""
    encoder_hidden_size: PositiveInt | None = None
    """its width; default: the model's"""
    encoder_num_layers: PositiveInt = 2
    """layers of the LSTM"""

    peft_type: ClassVar[str] = "P_TUNING"

    def add(self, lm: LM) -> LM:
        lm = super().add(lm)
        width = lm.config.hidden_size
        hidden = self.encoder_hidden_size or width
        dtype = at_least_float32(tree.at(lm.abstract(), "embed/table").dtype)
        shape = (self.num_virtual_tokens, width)
        extra = {PROMPT: ExtraLeaf((None, None), lambda key, _: jax.random.normal(key, shape, dtype))}
        if self.encoder_reparameterization_type == "MLP":
            extra |= linears("", (width, hidden, hidden, width), dtype)
        else:
            for layer in range(self.encoder_num_layers):
                size = width if layer == 0 else 2 * hidden
                for direction in ("forward", "backward"):
                    folder = f"{ENCODER}/lstm_{layer}/{direction}"
                    for name, leaf in {
                        "input/kernel": (size, 4 * hidden),
                        "recurrent/kernel": (hidden, 4 * hidden),
                        "bias": (4 * hidden,),
                    }.items():
                        extra[f"{folder}/{name}"] = uniform(leaf, 1 / math.sqrt(hidden), dtype)
            extra |= linears("", (2 * hidden, 2 * hidden, width), dtype)
        return replace(lm, extra={**lm.extra, **extra}, prompt_tokens=self.num_virtual_tokens)

    def tensors(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the encoder makes: the files do not have the encoder itself."""
        embed = tree.insert({}, leaves)["embed"]
        return {TENSOR: np.ascontiguousarray(virtual_tokens(embed["prompt"], embed["prompt_encoder"]))}


def linears(folder: str, widths: tuple[int, ...], dtype: Any) -> dict[str, ExtraLeaf]:
    """The layers of an encoder, drawn as torch draws those of its own."""
    leaves: dict[str, ExtraLeaf] = {}
    for i, (size, out) in enumerate(itertools.pairwise(widths)):
        for name, shape in {"kernel": (size, out), "bias": (out,)}.items():
            leaves[f"{ENCODER}/{folder}linear_{i}/{name}"] = uniform(shape, 1 / math.sqrt(size), dtype)
    return leaves


def uniform(shape: tuple[int, ...], bound: float, dtype: Any) -> ExtraLeaf:
    """A leaf that every device holds, drawn between ±bound."""
    return ExtraLeaf((None,) * len(shape), lambda key, _: jax.random.uniform(key, shape, dtype, -bound, bound))


METHODS.add("prompt_tuning", PromptTuning)
METHODS.add("p_tuning", PTuning)
ADAPTERS.add("PROMPT_TUNING", PromptTuning)
# The files of p-tuning have what its encoder has made, and no encoder: such a prompt trains on as one of its own.
ADAPTERS.add("P_TUNING", PromptTuning)
