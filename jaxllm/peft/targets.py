"""The modules that a method is for, chosen and named as in HF PEFT."""

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import model_validator

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.models.lm import LM
from jaxllm.peft.files import PREFIX, AdapterOfParts
from jaxllm.peft.layer_sampling import LayerDraws
from jaxllm.peft.modules import Module, ends, holders, is_named, modules
from jaxllm.peft.patterns import ExpressionError, check, matching

ALL_LINEAR = "all-linear"

# What the files of transformers call the embedding and the head.
OUTER_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


class Targeted(AdapterOfParts):
    """What the methods have that put leaves beside matrices."""

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """the matrices that get them: all-linear (all of the layers), a list of names such as [q_proj, v_proj], or a
    regular expression of the whole name, such as '.*layers\\.[0-3]\\..*_proj'; with lora, embed_tokens and lm_head are
    matrices too"""
    modules_to_save: tuple[str, ...] = ()
    """modules that train as a whole, such as [lm_head, embed_tokens] or [mlp], and are in the adapter's files; as in HF
    PEFT, a name also means those that it is the end of: norm all norms of a Llama, model.norm the last one"""
    save_embedding_layers: bool = False
    """whether the adapter's files hold the embedding and the head too, which do not train, as for a model whose
    vocabulary was resized before"""
    lisa: LayerDraws | None = None
    """the adapters of a few layers train at a time, as with type: lisa; default: those of all layers"""

    adapts_outer: ClassVar[bool] = False
    """Whether the embedding and the head can get them too."""

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
            of_layers = [layers for module, layers in self.target_layers(lm) if module.stacked]
            adapted = [any(layer) for layer in zip(*of_layers, strict=True)] or [False]
            if not all(adapted):
                raise UserError(
                    f"peft.lisa draws from all layers, and layer {adapted.index(False)} has no adapter; choose modules "
                    "of every layer, or remove lisa"
                )
        return super().mask(lm)

    def is_in_layer(self, module: Module, layer: int) -> bool:
        """Whether the matrix of `layer` is meant, if target_modules mean its name."""
        del module, layer
        return True

    def target_layers(self, lm: LM) -> list[tuple[Module, tuple[bool, ...]]]:
        """The matrices that are meant, and in which layers. Raises UserError if the config names what is not there."""
        wanted = self.target_modules
        every = [module for module in modules(lm) if module.is_matrix or module.is_outer]
        names = {name: module for module in every for name in (*module.names, *filter(None, [module.alias]))}
        if wanted == ALL_LINEAR:
            chosen = frozenset(name for name, module in names.items() if module.is_matrix)
        else:
            chosen = chosen_names("target_modules", wanted, names)
        saved = self.saved(lm)
        left = {name for name in chosen if not any(is_named(holder, saved) for holder in holders(name))}
        found = list[tuple[Module, tuple[bool, ...]]]()
        for module in every:
            layers = tuple(
                (name in left or module.alias in left) and self.is_in_layer(module, i)
                for i, name in enumerate(module.names)
            )
            if any(layers):
                found.append((module, layers))
        inner_first = sorted(every, key=lambda module: module.is_outer)
        short = dict.fromkeys(module.short for module in inner_first if self.adapts_outer or module.is_matrix)
        if not found:
            if chosen and not left:
                self.whole(lm)  # which says what else is wrong with them
                raise UserError(
                    f"peft.target_modules {shown(wanted)} means modules that modules_to_save trains as a whole, and no "
                    "others; choose others, or take these out of modules_to_save"
                )
            a_text = " (a text must match whole names: give a list)" if isinstance(wanted, str) else ""
            raise UserError(
                f"peft.target_modules {shown(wanted)} matches no matrix of the model{a_text}; "
                f"choose among {', '.join(short)}, or {ALL_LINEAR}"
            )
        if not isinstance(wanted, str):
            check_each("target_modules", wanted, names, {module.short for module in every})
        outer = [module.short for module, _ in found if module.is_outer]
        if outer and not self.adapts_outer:
            raise UserError(
                f"peft.target_modules {shown(wanted)} means {outer[0]}, which is in no layer, and type {self.type} "
                f"adapts matrices of the layers; choose among {', '.join(short)}, or set type to lora"
            )
        return found

    def whole(self, lm: LM) -> set[str]:
        """The paths of the model's own parameters that train. Raises UserError for a module that it does not have."""
        every = modules(lm)
        saved = self.saved(lm)
        names = dict.fromkeys(holder for module in every for name in module.names for holder in holders(name))
        check_each("modules_to_save", saved, names, {module.short for module in every})
        # Any end of a name counts, as in HF PEFT, where norm also means input_layernorm.
        held = {name for name in names if name.endswith(saved)}
        if lists := [name for name in held if f"{name}.0" in names]:
            raise UserError(
                f"peft.modules_to_save means {lists[0]}, a list of layers, which HF peft does not save as a whole; "
                "name what the layers have, such as self_attn and mlp, or train the model without an adapter"
            )
        paths = set[str]()
        for module in every:
            chosen = [not held.isdisjoint(holders(name)) for name in module.names]
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

    def held(self, lm: LM) -> set[str]:
        outer = {module.path for module in modules(lm) if module.is_outer}
        return outer - self.whole(lm) if self.save_embedding_layers else set()

    def holds_embeddings(self, names: Iterable[str]) -> bool:
        """Whether the tensors `names` of a file have an embedding or a head, and not for modules_to_save."""
        outer = {name.removeprefix(PREFIX).removesuffix(".weight") for name in names if name.endswith(OUTER_WEIGHTS)}
        return any(not any(holder.endswith(self.modules_to_save) for holder in holders(name)) for name in outer)

    def adapted(self, lm: LM) -> set[str]:
        """The names of the modules with an adapter."""
        return {
            name
            for module, layers in self.target_layers(lm)
            for name, chosen in zip(module.names, layers, strict=True)
            if chosen
        }

    def wrapped(self, lm: LM) -> dict[str, str]:
        tied = {module.alias for module, _ in self.target_layers(lm) if module.alias}
        return dict.fromkeys(self.adapted(lm) | tied, ".base_layer")

    def changes_tied(self, lm: LM) -> bool:
        if not lm.config.tie_word_embeddings:
            return False
        adapts = any(module.is_embedding for module, _ in self.target_layers(lm))
        return adapts or any(module.is_embedding and module.path in self.whole(lm) for module in modules(lm))

    def description(self, lm: LM) -> dict[str, Any]:
        names = self.target_modules
        if names == ALL_LINEAR:
            names = tuple(dict.fromkeys(module.short for module, _ in self.target_layers(lm)))
        elif isinstance(names, str) and any(module.alias for module, _ in self.target_layers(lm)):
            names = tuple(sorted(self.adapted(lm)))  # HF PEFT does not tie what an expression of whole names means
        return {
            **super().description(lm),
            "target_modules": names if isinstance(names, str) else list(names),
            "modules_to_save": list(self.saved(lm)) or None,
        }


def chosen_names(key: str, wanted: str | Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that a setting such as target_modules means. Raises UserError for an expression that takes too
    long."""
    if not isinstance(wanted, str):
        return frozenset(name for name in names if is_named(name, wanted))
    try:
        return matching(wanted, tuple(names))
    except ExpressionError as error:
        raise UserError(f"peft.{key} {shown(wanted)} {error}") from error


def shown(wanted: str | Iterable[str]) -> str:
    """target_modules in a message."""
    text = repr(wanted) if isinstance(wanted, str) else str([*wanted])
    return text if len(text) <= 100 else f"{text[:97]}…"


def check_expression(key: str, wanted: str | Iterable[str]) -> None:
    """Raises ValueError if a text is no regular expression."""
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        try:
            check(wanted)
        except ExpressionError as error:
            raise ValueError(f"{key} {shown(wanted)} {error}") from error


def check_each(key: str, wanted: Iterable[str], names: Iterable[str], short: set[str]) -> None:
    """Raises UserError unless each of `wanted` is one of the model's `names`."""
    known = {end for name in names for end in ends(name)}
    for one in wanted:
        if one not in known:
            raise UserError(
                f"peft.{key} names {one!r}, which the model does not have.{did_you_mean(one, short)} It has "
                f"{', '.join(sorted(short))}"
            )
