"""LoRA (Hu et al., arXiv 2106.09685), and what has grown from it: rsLoRA, LoRA+ and DoRA."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import jax
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from jaxllm.core import tree
from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.core.tree import Params
from jaxllm.hf.export import gather, replacing, write_json, write_tensors
from jaxllm.hf.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jaxllm.hf.weights import weight_table
from jaxllm.models.base import LM
from jaxllm.peft.base import METHODS, PeftConfig
from jaxllm.peft.low_rank import ENDS, Target
from jaxllm.peft.modules import Module, is_named, modules

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ALL_LINEAR = "all-linear"

# What HF PEFT puts before a module's name.
PREFIX = "base_model.model."

# The fields that say what an adapter computes.
DESCRIBED = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "bias", "target_modules", "layers_to_transform", "modules_to_save"),
    *("rank_pattern", "alpha_pattern"),
)
V = TypeVar("V")


class Lora(PeftConfig):
    """Matrices of low rank beside those of the layers. Names and meanings are those of HF PEFT's LoraConfig."""

    type: Literal["lora"]
    r: PositiveInt = 8
    """rank of the added matrices"""
    lora_alpha: Positive = 8.0
    """what they add is multiplied by lora_alpha / r"""
    use_rslora: bool = False
    """it is multiplied by lora_alpha / √r (Kalajdzievski, arXiv 2312.03732)"""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """share of their input that is dropped in training"""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """the matrices that get them: all-linear (all of the layers), a list of names such as [q_proj, v_proj], or a
    regular expression of the whole name, such as '.*layers\\.[0-3]\\..*_proj'"""
    layers_to_transform: tuple[NonNegativeInt, ...] | None = None
    """the layers that get them, counted from 0; default: all"""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """ranks of single matrices, by a name or a regular expression of its end"""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """the same of lora_alpha"""
    modules_to_save: tuple[str, ...] = ()
    """modules that train as a whole, such as [lm_head, embed_tokens], and are in the adapter's files"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """the biases that train: none, all of the model, or those of the matrices with an adapter"""
    use_dora: bool = False
    """the norms of the columns train apart from their directions (DoRA: Liu et al., arXiv 2402.09353)"""
    loraplus_lr_ratio: Positive = 1.0
    """the learning rate of lora_b over that of all others (LoRA+: Hayou et al., arXiv 2402.12354), such as 16"""

    exported_to: ClassVar[str] = "export/adapter"
    exported_for: ClassVar[str] = "HF peft"

    @model_validator(mode="after")
    def _layers_of_names(self) -> "Lora":
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules {self.target_modules!r} is no regular expression: {error}") from error
            if self.layers_to_transform is not None:
                raise ValueError("layers_to_transform goes with names; write the layers into the regular expression")
        return self

    def add(self, lm: LM) -> LM:
        extra = [target.leaves(lm, self.use_dora) for target in self.targets(lm)]
        return replace(lm, extra=reduce(dict.__or__, extra), adapter_dropout=self.lora_dropout)

    def mask(self, lm: LM) -> Any:
        chosen = self.whole(lm)
        return tree.map_with_path(
            lambda path, _: path in chosen or (path in lm.extra and not path.endswith("/lora_scale")), lm.abstract()
        )

    def rates(self) -> Mapping[str, float]:
        return {} if self.loraplus_lr_ratio == 1 else {"*/lora_b": self.loraplus_lr_ratio}

    def export(self, lm: LM, params: Params, folder: Path, *, model_folder: Path, base: str | None) -> None:
        """Writes the adapter in the files of HF PEFT; an older one in `folder` is replaced."""
        leaves, whole, tensors = tree.flatten(params), self.whole(lm), {}
        for target in self.targets(lm):
            for name in ENDS:
                if (leaf := leaves.get(f"{target.module.folder}/{name}")) is not None:
                    stack = np.asarray(jax.device_put(leaf, lm.layout.replicated).addressable_data(0))
                    for key, layer, part in target.tensors(name):
                        tensors[PREFIX + key] = np.ascontiguousarray(stack[layer][part].T)
        adapted = {target.module.names[i] for target in self.targets(lm) for i, r in enumerate(target.ranks) if r}
        for entry in weight_table(lm):
            if entry.path in whole:
                tensor = gather(lm, leaves[entry.path], entry)
                for name in entry.names:
                    module, _, kind = name.rpartition(".")
                    tensors[f"{PREFIX}{module}{'.base_layer' if module in adapted else ''}.{kind}"] = tensor
        with replacing(folder.absolute(), sum(tensor.nbytes for tensor in tensors.values())) as new:
            write_tensors(tensors, new / ADAPTER_WEIGHTS)
            if jax.process_index() == 0:
                write_json(new / ADAPTER_CONFIG, self._description(lm, base))

    def targets(self, lm: LM) -> list[Target]:
        """The matrices that get an adapter. Raises UserError if the config names what the model does not have."""
        every = [module for module in modules(lm) if module.is_matrix]
        count = lm.config.num_hidden_layers
        if too_deep := [i for i in self.layers_to_transform or () if i >= count]:
            raise UserError(f"peft.layers_to_transform names layer {too_deep[0]}, and the model has 0 to {count - 1}")
        found = [self._target(module) for module in every]
        found = [target for target in found if any(target.ranks)]
        names = {name: module.short for module in every for name in module.names}
        if not found:
            raise UserError(
                f"peft.target_modules {self._shown()} matches no matrix of the layers; choose among "
                f"{', '.join(dict.fromkeys(names.values()))}, or {ALL_LINEAR}"
            )
        if not isinstance(self.target_modules, str):
            self._check_each("target_modules", self.target_modules, names, set(names.values()))
        targeted = [target.module.names[i] for target in found for i, r in enumerate(target.ranks) if r]
        for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for one in patterns:
                if not any(_fits(one, name) for name in targeted):
                    raise UserError(f"peft.{key} has {one!r}, which matches none of the matrices with an adapter")
        return found

    def whole(self, lm: LM) -> set[str]:
        """The paths of the model's own parameters that train. Raises UserError for a module that it does not have."""
        every = modules(lm)
        saved = self.saved(lm)
        names = [name for module in every for name in module.names]
        self._check_each("modules_to_save", saved, names, {module.short for module in every})
        paths = {module.path for module in every if is_named(module.names[0], saved)}
        if self.bias != "none":
            targets = self.targets(lm)
            partly = [target.module.short for target in targets if not all(target.ranks)]
            if partly and self.bias == "lora_only":
                raise UserError(
                    f"peft.bias is lora_only, and {partly[0]} has an adapter in some layers only, while its biases "
                    "train in all; set bias to all or none"
                )
            beside = {target.module.folder for target in targets}
            biases = {m.path for m in every if m.kind == "bias" and (self.bias == "all" or m.folder in beside)}
            if not biases:
                raise UserError(f"peft.bias is {self.bias}, and the model has no such bias; set it to none")
            paths |= biases
        return paths

    def saved(self, lm: LM) -> tuple[str, ...]:
        """modules_to_save, in which the head of a model that has none of its own is the embedding."""
        tied = lm.config.tie_word_embeddings
        return tuple(
            dict.fromkeys("embed_tokens" if tied and one == "lm_head" else one for one in self.modules_to_save)
        )

    def _is_target(self, name: str, layer: int) -> bool:
        if is_named(name, self.modules_to_save):
            return False
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or re.fullmatch(self.target_modules, name) is not None
        return is_named(name, self.target_modules)

    def _target(self, module: Module) -> Target:
        ranks, scales = [], []
        for i, name in enumerate(module.names):
            r = _first_fit(self.rank_pattern, name, self.r) if self._is_target(name, i) else 0
            alpha = _first_fit(self.alpha_pattern, name, self.lora_alpha)
            ranks.append(r)
            scales.append(alpha / (math.sqrt(r) if self.use_rslora else r) if r else 0.0)
        return Target(module, tuple(ranks), tuple(scales))

    def _description(self, lm: LM, base: str | None) -> dict[str, Any]:
        names = self.target_modules
        if names == ALL_LINEAR:
            names = tuple(dict.fromkeys(target.module.short for target in self.targets(lm)))
        saved = self.saved(lm)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            **self.model_dump(mode="json", include={*DESCRIBED, "lora_dropout"}),
            "target_modules": names if isinstance(names, str) else list(names),
            "modules_to_save": list(saved) or None,
            "ensure_weight_tying": lm.config.tie_word_embeddings and "embed_tokens" in saved,
        }

    def _check_each(self, key: str, wanted: Iterable[str], names: Iterable[str], short: set[str]) -> None:
        for one in wanted:
            if not any(is_named(name, [one]) for name in names):
                raise UserError(
                    f"peft.{key} names {one!r}, which the model does not have.{did_you_mean(one, short)} It has "
                    f"{', '.join(sorted(short))}"
                )

    def _shown(self) -> str:
        return repr(self.target_modules) if isinstance(self.target_modules, str) else str([*self.target_modules])


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_fit(patterns: Mapping[str, V], name: str, otherwise: V) -> V:
    return next((value for pattern, value in patterns.items() if _fits(pattern, name)), otherwise)


METHODS.add("lora", Lora)
