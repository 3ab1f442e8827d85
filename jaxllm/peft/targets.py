"""The modules that a method is for, chosen and named as in HF PEFT."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import model_validator

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.models.base import LM
from jaxllm.peft.draws import LayerDraws
from jaxllm.peft.files import AdapterOfParts
from jaxllm.peft.modules import Module, is_named, modules

ALL_LINEAR = "all-linear"


class Targeted(AdapterOfParts):
    """What the methods have that put leaves beside the matrices of the layers."""

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """the matrices that get them: all-linear (all of the layers), a list of names such as [q_proj, v_proj], or a
    regular expression of the whole name, such as '.*layers\\.[0-3]\\..*_proj'"""
    modules_to_save: tuple[str, ...] = ()
    """modules that train as a whole, such as [lm_head, embed_tokens], and are in the adapter's files; as in HF PEFT, a
    name also means those that it is the end of: norm all norms of a Llama, model.norm the last one"""
    lisa: LayerDraws | None = None
    """the adapters of a few layers train at a time, as with type: lisa; default: those of all layers"""

    @model_validator(mode="after")
    def _is_expression(self) -> "Targeted":
        check_expression("target_modules", self.target_modules)
        return self

    @property
    def draws(self) -> LayerDraws | None:
        return self.lisa

    def mask(self, lm: LM) -> Any:
        if self.lisa is not None:
            self.lisa.check(lm, "peft.lisa")
            adapted = [any(layer) for layer in zip(*(layers for _, layers in self.target_layers(lm)), strict=True)]
            if not all(adapted):
                raise UserError(
                    f"peft.lisa draws from all layers, and layer {adapted.index(False)} has no adapter; choose modules "
                    "of every layer, or remove lisa"
                )
        return super().mask(lm)

    def is_target(self, name: str, layer: int) -> bool:
        """Whether the matrix of `name` in `layer` is one of target_modules."""
        del layer
        return not is_named(name, self.modules_to_save) and is_chosen(name, self.target_modules)

    def target_layers(self, lm: LM) -> list[tuple[Module, tuple[bool, ...]]]:
        """The matrices that are meant, and in which layers. Raises UserError if the config names what is not there."""
        every = [module for module in modules(lm) if module.is_matrix]
        found = [(module, tuple(self.is_target(name, i) for i, name in enumerate(module.names))) for module in every]
        found = [(module, layers) for module, layers in found if any(layers)]
        names = {name: module.short for module in every for name in module.names}
        if not found:
            a_text = " (a text must match whole names: give a list)" if isinstance(self.target_modules, str) else ""
            raise UserError(
                f"peft.target_modules {shown(self.target_modules)} matches no matrix of the layers{a_text}; "
                f"choose among {', '.join(dict.fromkeys(names.values()))}, or {ALL_LINEAR}"
            )
        if not isinstance(self.target_modules, str):
            check_each("target_modules", self.target_modules, names, set(names.values()))
        return found

    def whole(self, lm: LM) -> set[str]:
        """The paths of the model's own parameters that train. Raises UserError for a module that it does not have."""
        every = modules(lm)
        saved = self.saved(lm)
        names = [name for module in every for name in module.names]
        check_each("modules_to_save", saved, names, {module.short for module in every})
        paths = set[str]()
        for module in every:
            # Any end of a name counts, as in HF PEFT, where norm also means input_layernorm.
            chosen = [name.endswith(saved) for name in module.names]
            if any(chosen) and not all(chosen):
                raise UserError(
                    f"peft.modules_to_save means {module.short} in some of its layers only, which is not implemented; "
                    f"name it without a layer: {module.short}"
                )
            if any(chosen):
                paths.add(module.path)
        return paths

    def saved(self, lm: LM) -> tuple[str, ...]:
        """modules_to_save, in which the head of a model that has none of its own is the embedding."""
        tied = lm.config.tie_word_embeddings
        return tuple(
            dict.fromkeys("embed_tokens" if tied and one == "lm_head" else one for one in self.modules_to_save)
        )

    def adapted(self, lm: LM) -> set[str]:
        return {
            name
            for module, layers in self.target_layers(lm)
            for name, chosen in zip(module.names, layers, strict=True)
            if chosen
        }

    def description(self, lm: LM) -> dict[str, Any]:
        names = self.target_modules
        if names == ALL_LINEAR:
            names = tuple(dict.fromkeys(module.short for module, _ in self.target_layers(lm)))
        return {
            **super().description(lm),
            "target_modules": names if isinstance(names, str) else list(names),
            "modules_to_save": list(self.saved(lm)) or None,
        }


def is_chosen(name: str, wanted: str | Iterable[str]) -> bool:
    """Whether a matrix is one of target_modules."""
    if isinstance(wanted, str):
        return wanted == ALL_LINEAR or re.fullmatch(wanted, name) is not None
    return is_named(name, wanted)


def shown(wanted: str | Iterable[str]) -> str:
    """target_modules in a message."""
    return repr(wanted) if isinstance(wanted, str) else str([*wanted])


def check_expression(key: str, wanted: str | Iterable[str]) -> None:
    """Raises ValueError if a text is no regular expression."""
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        try:
            re.compile(wanted)
        except re.error as error:
            raise ValueError(f"{key} {wanted!r} is no regular expression: {error}") from error


def check_each(key: str, wanted: Iterable[str], names: Iterable[str], short: set[str]) -> None:
    """Raises UserError unless each of `wanted` is one of the model's `names`."""
    names = list(names)
    for one in wanted:
        if not any(is_named(name, [one]) for name in names):
            raise UserError(
                f"peft.{key} names {one!r}, which the model does not have.{did_you_mean(one, short)} It has "
                f"{', '.join(sorted(short))}"
            )
