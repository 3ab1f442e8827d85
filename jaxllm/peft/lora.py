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
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.models.quantized import Quantization
from jaxllm.peft import keys
from jaxllm.peft.base import ADAPTERS, METHODS, PeftConfig
from jaxllm.peft.files import AdapterFiles, OwnWeights, Part
from jaxllm.peft.layer_sampling import LayerDraws
from jaxllm.peft.low_rank import LowRank
from jaxllm.peft.modules import Module, is_named, modules
from jaxllm.peft.patterns import ExpressionError, check, matching
from jaxllm.peft.targets import Targets, shown
from jaxllm.peft.tokens import token_leaves, token_part

V = TypeVar("V")


class Lora(PeftConfig):
    """Matrices of low rank beside those of the layers. Names and meanings are those of HF PEFT's LoraConfig."""

    type: Literal["lora"]
    target_modules: keys.TargetModules = keys.ALL_LINEAR
    modules_to_save: keys.ModulesToSave = ()
    save_embedding_layers: keys.SaveEmbeddingLayers = False
    lisa: keys.Lisa = None
    lora_dropout: keys.LoraDropout = 0.0
    layers_to_transform: keys.LayersToTransform = None
    bias: keys.TrainedBiases = "none"
    r: keys.Rank = 8
    """rank of the added matrices"""
    lora_alpha: keys.Positive = 8.0
    """what they add is multiplied by lora_alpha / r"""
    use_rslora: bool = False
    """it is multiplied by lora_alpha / √r (Kalajdzievski, arXiv 2312.03732)"""
    init_lora_weights: Literal[True, "pissa"] = True
    """what they are at the start: true (nothing is added), or pissa, the largest singular values and vectors of the
    matrix, whose part of it then trains, at a lower learning rate (PiSSA: Meng et al., arXiv 2404.02948)"""
    rank_pattern: dict[str, keys.Rank] = Field(default_factory=dict)
    """ranks of single matrices, by a name or a regular expression of its end"""
    alpha_pattern: dict[str, keys.Positive] = Field(default_factory=dict)
    """the same of lora_alpha"""
    use_dora: bool = False
    """the norms of the columns train apart from their directions (DoRA: Liu et al., arXiv 2402.09353)"""
    loraplus_lr_ratio: keys.Positive = 1.0
    """the learning rate of lora_b over that of all others (LoRA+: Hayou et al., arXiv 2402.12354), such as 16"""

    trainable_token_indices: tuple[NonNegativeInt, ...] = ()
    """ids of tokens whose embeddings train besides, such as new ones; the rest of the embedding does not"""

    files: ClassVar[AdapterFiles] = AdapterFiles(
        "LORA",
        described=(
            *("r", "lora_alpha", "use_rslora", "use_dora", "bias", "target_modules", "layers_to_transform"),
            *("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
        ),
        in_order=("trainable_token_indices",),  # that of the rows
        inert=(
            *("ensure_weight_tying", "init_lora_weights", "layers_pattern", "lora_dropout", "megatron_core"),
            "qalora_group_size",  # of use_qalora
            *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of kinds of init_lora_weights
        ),
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

    @property
    def targets(self) -> Targets:
        saved = self.modules_to_save, self.save_embedding_layers
        layers, bias = self.layers_to_transform, self.bias
        return Targets(self.type, self.target_modules, *saved, layers, bias, adapts_outer=True)

    @property
    def draws(self) -> LayerDraws | None:
        return self.lisa

    @property
    def _principal(self) -> bool:
        return self.init_lora_weights == "pissa"

    def conflicts_with_quantization(self, quantization: Quantization) -> Iterator[Conflict]:
        del quantization
        if self._principal:
            yield Conflict(
                "model.quantize stores the matrices, and peft.init_lora_weights is pissa, which takes a part of them "
                "away",
                "set init_lora_weights to true, or remove quantize",
            )

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        ids = self.trainable_token_indices
        if ids and is_named("model.embed_tokens", self.targets.saved(lm)):
            raise UserError(
                "peft.modules_to_save trains the whole embedding, and trainable_token_indices rows of it; remove "
                "one of them"
            )
        adapters = self._adapters(lm)
        for adapter in adapters:
            if adapter.module.is_outer:
                self._check_outer(adapter.module)
        found = [adapter.leaves(lm, self.use_dora, self._principal) for adapter in adapters]
        return reduce(dict.__or__, [*found, token_leaves(lm, ids) if ids else {}])

    def settings(self) -> Mapping[str, Any]:
        return {"adapter_dropout": self.lora_dropout}

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

    # The files

    def computes(self, lm: LM) -> Any:
        own = self.targets.own_weights(lm)
        how = (self.use_dora, self.init_lora_weights, self.trainable_token_indices, own.untrained)
        return self._adapters(lm), how, own.trained

    def finished(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        # What PiSSA has taken away at the start.
        return {path: -leaf if path.endswith("/lora_b_start") else leaf for path, leaf in leaves.items()}

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        content = {
            **super().description(lm, leaves),
            "lora_dropout": self.lora_dropout,
            "ensure_weight_tying": self.targets.changes_tied(lm),
            "trainable_token_indices": [*self.trainable_token_indices] or None,
        }
        if self._principal:  # the files have what was taken away beside what is added, of that rank
            factor = math.sqrt(2) if self.use_rslora else 2
            content |= {
                "r": 2 * self.r,
                "lora_alpha": factor * self.lora_alpha,
                "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
                "alpha_pattern": {name: factor * alpha for name, alpha in self.alpha_pattern.items()},
            }
        return content

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        adapters, ids = self._adapters(lm), self.trainable_token_indices
        found = [part for adapter in adapters for part in adapter.parts(lm, self.use_dora, self._principal)]
        return [*found, token_part(lm, ids)] if ids else found

    def own_weights(self, lm: LM) -> OwnWeights:
        own = super().own_weights(lm)
        embedding = next(module for module in modules(lm) if module.is_embedding)
        names = filter(None, (embedding.names[0], embedding.alias)) if self.trainable_token_indices else ()
        return replace(own, wrapped={**own.wrapped, **dict.fromkeys(names, ".token_adapter.base_layer")})

    def _adapters(self, lm: LM) -> list[LowRank]:
        """Those of the matrices. Raises UserError if the config names what the model does not have."""
        names = tuple(sorted(self.targets.names(lm)))
        ranks = _by_name("rank_pattern", self.rank_pattern, names)
        alphas = _by_name("alpha_pattern", self.alpha_pattern, names)
        return [self._adapter(module, layers, ranks, alphas) for module, layers in self.targets.matrices(lm)]

    def _adapter(
        self, module: Module, layers: tuple[bool, ...], ranks: Mapping[str, int], alphas: Mapping[str, float]
    ) -> LowRank:
        of_layers = [
            ranks.get(name, self.r) if chosen else 0 for name, chosen in zip(module.names, layers, strict=True)
        ]
        scales = [
            alphas.get(name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r) if r else 0.0
            for name, r in zip(module.names, of_layers, strict=True)
        ]
        return LowRank(module, tuple(of_layers), tuple(scales))


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
