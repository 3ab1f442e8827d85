"""LoRA (Hu et al., arXiv 2106.09685), and what has grown from it: rsLoRA, LoRA+, DoRA and PiSSA."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator

from jaxllm.core.config import Conflict
from jaxllm.core.errors import UserError
from jaxllm.models.lm import LM
from jaxllm.models.quantized import Quantization
from jaxllm.peft.base import METHODS
from jaxllm.peft.files import ADAPTERS, PREFIX, Part
from jaxllm.peft.low_rank import START, LowRank, Positive, Rank, Target
from jaxllm.peft.modules import Module, is_named, modules
from jaxllm.peft.patterns import ExpressionError, check, matching
from jaxllm.peft.targets import shown
from jaxllm.peft.tokens import token_leaves, token_part

V = TypeVar("V")


class Lora(LowRank):
    """Matrices of low rank beside those of the layers. Names and meanings are those of HF PEFT's LoraConfig."""

    type: Literal["lora"]
    r: Rank = 8
    """rank of the added matrices"""
    lora_alpha: Positive = 8.0
    """what they add is multiplied by lora_alpha / r"""
    use_rslora: bool = False
    """it is multiplied by lora_alpha / √r (Kalajdzievski, arXiv 2312.03732)"""
    init_lora_weights: Literal[True, "pissa"] = True
    """what they are at the start: true (nothing is added), or pissa, the largest singular values and vectors of the
    matrix, whose part of it then trains, at a lower learning rate (PiSSA: Meng et al., arXiv 2404.02948)"""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """ranks of single matrices, by a name or a regular expression of its end"""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """the same of lora_alpha"""
    use_dora: bool = False
    """the norms of the columns train apart from their directions (DoRA: Liu et al., arXiv 2402.09353)"""
    loraplus_lr_ratio: Positive = 1.0
    """the learning rate of lora_b over that of all others (LoRA+: Hayou et al., arXiv 2402.12354), such as 16"""

    trainable_token_indices: tuple[NonNegativeInt, ...] = ()
    """ids of tokens whose embeddings train besides, such as new ones; the rest of the embedding does not"""

    peft_type: ClassVar[str] = "LORA"
    adapts_outer: ClassVar[bool] = True
    described: ClassVar[tuple[str, ...]] = (
        *("r", "lora_alpha", "use_rslora", "use_dora", "bias", "target_modules", "layers_to_transform"),
        *("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
    )
    inert: ClassVar[tuple[str, ...]] = (
        *("ensure_weight_tying", "init_lora_weights", "layers_pattern", "lora_dropout", "megatron_core"),
        "qalora_group_size",  # of use_qalora
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of kinds of init_lora_weights
    )

    @field_validator("r", "rank_pattern", mode="before")
    @classmethod
    def _has_rank(cls, value: Any) -> Any:
        for rank in value.values() if isinstance(value, dict) else [value]:
            if isinstance(rank, int) and rank < 1:
                raise ValueError(
                    f"a rank of {rank} adds nothing; set it to 1 or more, such as 8, or remove the peft section to "
                    "train the whole model"
                )
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_expressions(cls, value: dict[str, V], info: ValidationInfo) -> dict[str, V]:
        for pattern in value:
            try:
                check(pattern, ends=True)
            except ExpressionError as error:
                raise ValueError(
                    f"{info.field_name} has {shown(pattern)}, which {error}; give the end of a name, such as q_proj, "
                    "or an expression of it, such as 'layers.0.*'"
                ) from error
        return value

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _of_the_embedding(cls, value: Any) -> Any:
        """HF PEFT also takes the ids by the name of the module; those of a tied head are those of the embedding."""
        if isinstance(value, dict):
            of_modules = {name.rpartition(".")[2]: ids for name, ids in value.items()}
            value = of_modules.pop("embed_tokens", ())
            if any(ids != value for ids in of_modules.values()) or of_modules.keys() - {"lm_head"}:
                raise ValueError(f"only tokens of embed_tokens can train; got some of {', '.join(of_modules)}")
        return tuple(value) if isinstance(value, list) else () if value is None else value

    @field_validator("trainable_token_indices")
    @classmethod
    def _each_once(cls, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ids)) < len(ids):
            raise ValueError(f"each id once; got {[*ids]}")
        return ids

    @classmethod
    def section(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        values = super().section(raw)
        if ids := raw.get("trainable_token_indices"):
            values["trainable_token_indices"] = ids  # in the order of the rows in the file
        return values

    def conflicts_with_quantization(self, quantization: Quantization) -> Iterator[Conflict]:
        del quantization
        if self.init_lora_weights == "pissa":
            yield Conflict(
                "model.quantize stores the matrices, and peft.init_lora_weights is pissa, which takes a part of them "
                "away",
                "set init_lora_weights to true, or remove quantize",
            )

    def saved(self, lm: LM) -> tuple[str, ...]:
        saved = super().saved(lm)
        if self.trainable_token_indices and is_named("model.embed_tokens", saved):
            raise UserError(
                "peft.modules_to_save trains the whole embedding, and trainable_token_indices rows of it; remove "
                "one of them"
            )
        return saved

    def add(self, lm: LM) -> LM:
        targets = self.targets(lm)
        for target in targets:
            if target.module.is_outer:
                self._check_outer(target.module)
        extra = [target.leaves(lm, self.use_dora, self.init_lora_weights == "pissa") for target in targets]
        if self.trainable_token_indices:
            extra.append(token_leaves(lm, self.trainable_token_indices))
        return replace(lm, extra={**lm.extra, **reduce(dict.__or__, extra)}, adapter_dropout=self.lora_dropout)

    def _check_outer(self, module: Module) -> None:
        """Raises UserError where an adapter of the embedding or the head does not go with another setting."""
        means = f"target_modules means {module.short}"
        if module.is_embedding and self.trainable_token_indices:
            raise UserError(f"peft.{means}, and trainable_token_indices rows of it; remove one of them")
        if module.alias and self.use_dora:
            raise UserError(
                f"peft.{means}, which is the head too, and use_dora gives each norms of its own; set use_dora to "
                f"false, or leave {module.short} out"
            )
        if self.lora_dropout and (module.alias or not module.is_embedding):
            raise UserError(
                f"peft.lora_dropout is {self.lora_dropout}, which is not implemented for the head, and {means}"
                f"{', which is the head too' if module.alias else ''}; set lora_dropout to 0, or leave it out"
            )

    def rates(self) -> Mapping[str, float]:
        return {} if self.loraplus_lr_ratio == 1 else {"*/lora_b": self.loraplus_lr_ratio}

    def parts(self, lm: LM) -> list[Part]:
        found = [
            replace(part, name=PREFIX + part.name)
            for target in self.targets(lm)
            for part in target.parts(lm, self.use_dora, self.init_lora_weights == "pissa")
        ]
        ids = self.trainable_token_indices
        return [*found, token_part(lm, ids)] if ids else found

    def tensors(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = super().tensors(lm, leaves)
        for name in [name for name in tensors if name.endswith(START)]:
            start, whole = tensors.pop(name), name.removesuffix(START) + ".weight"
            halves = [tensors[whole], start] if whole.endswith("lora_A.weight") else [tensors[whole], -start]
            tensors[whole] = np.concatenate(halves, axis=0 if whole.endswith("lora_A.weight") else 1)
        return tensors

    def wrapped(self, lm: LM) -> dict[str, str]:
        embedding = next(module for module in modules(lm) if module.is_embedding)
        names = filter(None, (embedding.names[0], embedding.alias)) if self.trainable_token_indices else ()
        return {**super().wrapped(lm), **dict.fromkeys(names, ".token_adapter.base_layer")}

    def computes(self, lm: LM) -> Any:
        how = (self.use_dora, self.init_lora_weights, self.trainable_token_indices, self.held(lm))
        return self.targets(lm), how, self.whole(lm)

    def targets(self, lm: LM) -> list[Target]:
        """The matrices that get an adapter. Raises UserError if the config names what the model does not have."""
        names = tuple(sorted(self.adapted(lm)))
        ranks = _by_name("rank_pattern", self.rank_pattern, names)
        alphas = _by_name("alpha_pattern", self.alpha_pattern, names)
        return [self._target(module, layers, ranks, alphas) for module, layers in self.target_layers(lm)]

    def description(self, lm: LM) -> dict[str, Any]:
        content = super().description(lm)
        content["trainable_token_indices"] = [*self.trainable_token_indices] or None
        if self.init_lora_weights == "pissa":  # the files have what was taken away beside what is added, of that rank
            factor = math.sqrt(2) if self.use_rslora else 2
            content |= {
                "r": 2 * self.r,
                "lora_alpha": factor * self.lora_alpha,
                "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
                "alpha_pattern": {name: factor * alpha for name, alpha in self.alpha_pattern.items()},
            }
        return content

    def _target(
        self, module: Module, layers: tuple[bool, ...], ranks: Mapping[str, int], alphas: Mapping[str, float]
    ) -> Target:
        of_layers = [
            ranks.get(name, self.r) if chosen else 0 for name, chosen in zip(module.names, layers, strict=True)
        ]
        scales = [
            alphas.get(name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r) if r else 0.0
            for name, r in zip(module.names, of_layers, strict=True)
        ]
        return Target(module, tuple(of_layers), tuple(scales))


def _by_name(key: str, patterns: Mapping[str, V], names: tuple[str, ...]) -> dict[str, V]:
    """The value of the first pattern that fits, by the name that it fits."""
    values = dict[str, V]()
    for pattern, value in patterns.items():
        try:
            fitting = matching(pattern, names, ends=True)
        except ExpressionError as error:
            raise UserError(f"peft.{key} has {shown(pattern)}, which {error}") from error
        if not fitting:
            raise UserError(f"peft.{key} has {shown(pattern)}, which matches none of the matrices with an adapter")
        for name in fitting:
            values.setdefault(name, value)
    return values


METHODS.add("lora", Lora)
ADAPTERS.add("LORA", Lora)
