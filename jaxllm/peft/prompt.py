"""Virtual tokens in front of every document: prompt tuning (Lester et al., arXiv 2104.08691) and p-tuning (Liu et al.,
arXiv 2103.10385).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
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
from jaxllm.nn.prompt import virtual_tokens as encoded_prompt
from jaxllm.peft import keys, virtual_tokens
from jaxllm.peft.base import ADAPTERS, METHODS, PeftConfig
from jaxllm.peft.files import AdapterFiles, Part
from jaxllm.peft.virtual_tokens import check_room, uniform

PROMPT, ENCODER = "embed/prompt", "embed/prompt_encoder"


class PromptTuning(PeftConfig):
    """Embeddings of virtual tokens train. Names and meanings are those of HF PEFT's PromptTuningConfig."""

    type: Literal["prompt_tuning"]
    num_virtual_tokens: keys.NumVirtualTokens = 20
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    """what they are at the start: RANDOM, embeddings of tokens drawn at random (SAMPLE_VOCAB), or those of
    prompt_tuning_init_text (TEXT), cut or repeated to num_virtual_tokens"""
    prompt_tuning_init_text: str | None = None
    """a text to start from, such as what the model is to do"""

    files: ClassVar[AdapterFiles] = virtual_tokens.files("PROMPT_TUNING")
    merges: ClassVar[bool] = False

    def conflicts_with_mesh(self, mesh: MeshConfig) -> Iterator[Conflict]:
        return virtual_tokens.context_conflicts(self.type, mesh)

    def settings(self) -> Mapping[str, Any]:
        return {"prompt_tokens": self.num_virtual_tokens}

    @model_validator(mode="after")
    def _has_text(self) -> "PromptTuning":
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise ValueError(
                f"prompt_tuning_init is {self.prompt_tuning_init} and prompt_tuning_init_text is "
                f"{self.prompt_tuning_init_text!r}; give TEXT and a text, or neither"
            )
        return self

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        check_room(self.type, self.num_virtual_tokens, lm)
        shape = (self.num_virtual_tokens, lm.config.hidden_size)
        dtype = at_least_float32(tree.at(lm.abstract(), "embed/table").dtype)

        def draw(key: jax.Array, params: Params) -> jax.Array:
            if self.prompt_tuning_init == "RANDOM":
                return jax.random.normal(key, shape, dtype)
            ids = jax.random.randint(key, shape[:1], 0, lm.config.vocab_size)
            return tree.at(params, "embed/table")[ids].astype(dtype)

        return {PROMPT: ExtraLeaf((None, None), draw)}

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

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {**super().description(lm, leaves), **virtual_tokens.description(lm)}

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        return [_part(self.num_virtual_tokens, lm)]


class PTuning(PeftConfig):
    """Embeddings of virtual tokens train through an encoder. Names and meanings are those of HF PEFT's
    PromptEncoderConfig."""

    type: Literal["p_tuning"]
    num_virtual_tokens: keys.NumVirtualTokens = 20
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """the encoder: MLP (three layers) or LSTM (of both directions, and two layers)"""
    encoder_hidden_size: PositiveInt | None = None
    """its width; default: the model's"""
    encoder_num_layers: PositiveInt = 2
    """layers of the LSTM"""

    files: ClassVar[AdapterFiles] = virtual_tokens.files("P_TUNING")
    merges: ClassVar[bool] = False

    def conflicts_with_mesh(self, mesh: MeshConfig) -> Iterator[Conflict]:
        return virtual_tokens.context_conflicts(self.type, mesh)

    def settings(self) -> Mapping[str, Any]:
        return {"prompt_tokens": self.num_virtual_tokens}

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        check_room(self.type, self.num_virtual_tokens, lm)
        width = lm.config.hidden_size
        hidden = self.encoder_hidden_size or width
        dtype = at_least_float32(tree.at(lm.abstract(), "embed/table").dtype)
        shape = (self.num_virtual_tokens, width)
        extra = {PROMPT: ExtraLeaf((None, None), lambda key, _: jax.random.normal(key, shape, dtype))}
        if self.encoder_reparameterization_type == "MLP":
            extra |= linears((width, hidden, hidden, width), dtype)
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
            extra |= linears((2 * hidden, 2 * hidden, width), dtype)
        return extra

    def finished(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        embed = tree.insert({}, leaves)["embed"]
        return {PROMPT: np.asarray(encoded_prompt(embed["prompt"], embed["prompt_encoder"]))}

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {**super().description(lm, leaves), **virtual_tokens.description(lm)}

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        return [_part(self.num_virtual_tokens, lm)]


def _part(count: int, lm: LM) -> Part:
    return Part(PROMPT, (), virtual_tokens.TENSOR, (count, lm.config.hidden_size))


def linears(widths: tuple[int, ...], dtype: Any) -> dict[str, ExtraLeaf]:
    """The layers of an encoder, drawn as torch draws those of its own."""
    leaves: dict[str, ExtraLeaf] = {}
    for i, (size, out) in enumerate(itertools.pairwise(widths)):
        for name, shape in {"kernel": (size, out), "bias": (out,)}.items():
            leaves[f"{ENCODER}/linear_{i}/{name}"] = uniform(shape, 1 / math.sqrt(size), dtype)
    return leaves


METHODS.add("prompt_tuning", PromptTuning)
METHODS.add("p_tuning", PTuning)
ADAPTERS.add("PROMPT_TUNING", PromptTuning)
# The files of p-tuning have what its encoder has made, and no encoder: such a prompt trains on as one of its own.
ADAPTERS.add("P_TUNING", PromptTuning)
