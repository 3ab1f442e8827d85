"""The modules that a method is for, chosen and named as in HF PEFT."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.models.lm import LM
from jaxllm.peft.files import PREFIX, OwnWeights
from jaxllm.peft.keys import ALL_LINEAR, Bias
from jaxllm.peft.layer_sampling import LayerDraws
from jaxllm.peft.modules import Module, ends, holders, is_named, modules
from jaxllm.peft.patterns import ExpressionError, check, matching

# What the files of transformers call the embedding and the head.
OUTER_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Targets:
    """The modules that get the leaves of a method of `type`, and those that train or are stored beside them.

    The fields have the names and meanings of the method's keys, and of those of HF PEFT. adapts_outer: whether the
    embedding and the head can get leaves too.
    """

    type: str
    target_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    save_embedding_layers: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    bias: Bias = "none"
    adapts_outer: bool = False

    def check(self) -> None:
        """Raises ValueError for what no model could make sense of."""
        check_expression("target_modules", self.target_modules)
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR and self.layers_to_transform:
            raise ValueError(
                f"layers_to_transform goes with a list of names, and target_modules is {shown(self.target_modules)}, a "
                "regular expression; write the layers into it, or give a list"
            )

    def check_draws(self, draws: LayerDraws, lm: LM) -> None:
        """Raises UserError where layers are to be drawn that have no adapter."""
        draws.check(lm, "peft.lisa")
        of_layers = [layers for module, layers in self.matrices(lm) if module.stacked]
        adapted = [any(layer) for layer in zip(*of_layers, strict=True)] or [False]
        if not all(adapted):
            raise UserError(
                f"peft.lisa draws from all layers, and layer {adapted.index(False)} has no adapter; choose modules "
                "of every layer, or remove lisa"
            )

    def matrices(self, lm: LM) -> list[tuple[Module, tuple[bool, ...]]]:
        """The matrices that are meant, and in which layers. Raises UserError if the config names what is not there."""
        wanted, count = self.target_modules, lm.config.num_hidden_layers
        if too_deep := [i for i in self.layers_to_transform or () if i >= count]:
            raise UserError(f"peft.layers_to_transform names layer {too_deep[0]}, and the model has 0 to {count - 1}")
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
                (name in left or module.alias in left) and self._is_in_layer(module, i)
                for i, name in enumerate(module.names)
            )
            if any(layers):
                found.append((module, layers))
        inner_first = sorted(every, key=lambda module: module.is_outer)
        short = dict.fromkeys(module.short for module in inner_first if self.adapts_outer or module.is_matrix)
        if not found:
            if chosen and not left:
                self._saved_whole(lm)  # which says what else is wrong with them
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

    def own_weights(self, lm: LM) -> OwnWeights:
        """The model's own parameters that the files have. Raises UserError for one that `lm` lacks."""
        trained, outer = self._trained(lm), {module.path for module in modules(lm) if module.is_outer}
        tied = {module.alias for module, _ in self.matrices(lm) if module.alias}
        return OwnWeights(
            trained=frozenset(trained),
            untrained=frozenset(outer - trained if self.save_embedding_layers else ()),
            wrapped=dict.fromkeys(self.names(lm) | tied, ".base_layer"),
            changes_tied=self.changes_tied(lm),
        )

    def changes_tied(self, lm: LM) -> bool:
        """Whether an embedding that is the head too is changed."""
        if not lm.config.tie_word_embeddings:
            return False
        adapts = any(module.is_embedding for module, _ in self.matrices(lm))
        return adapts or any(module.is_embedding and module.path in self._trained(lm) for module in modules(lm))

    def names(self, lm: LM) -> set[str]:
        """The names of the modules with an adapter."""
        return {
            name
            for module, layers in self.matrices(lm)
            for name, chosen in zip(module.names, layers, strict=True)
            if chosen
        }

    def _trained(self, lm: LM) -> set[str]:
        """The paths of the model's own parameters that train. Raises UserError for a module that it does not have."""
        return self._saved_whole(lm) | self._biases(lm)

    def _saved_whole(self, lm: LM) -> set[str]:
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

    def _biases(self, lm: LM) -> set[str]:
        if self.bias == "none":
            return set()
        targets, every = self.matrices(lm), modules(lm)
        partly = [module.short for module, layers in targets if not all(layers)]
        if partly and self.bias == "lora_only":
            raise UserError(
                f"peft.bias is lora_only, and {partly[0]} has an adapter in some layers only, while its biases "
                "train in all; set bias to all or none"
            )
        beside = {module.folder for module, _ in targets}
        biases = {m.path for m in every if m.kind == "bias" and (self.bias == "all" or m.folder in beside)}
        if not biases:
            raise UserError(f"peft.bias is {self.bias}, and the model has no such bias; set it to none")
        return biases

    def _is_in_layer(self, module: Module, layer: int) -> bool:
        """Whether the matrix of `layer` is meant, if target_modules mean its name."""
        # As in HF PEFT: no layers mean all, and a whole name means its matrix, whatever the layers are, as does the
        # name of an embedding that is the head too.
        if not self.layers_to_transform or module.names[layer] in self.target_modules or module.alias:
            return True
        return module.stacked and layer in self.layers_to_transform

    def saved(self, lm: LM) -> tuple[str, ...]:
        """modules_to_save, in which the head of a model that has none of its own is the embedding."""
        tied = lm.config.tie_word_embeddings
        return tuple(
            dict.fromkeys("embed_tokens" if tied and one == "lm_head" else one for one in self.modules_to_save)
        )

    def holds_embeddings(self, names: Iterable[str]) -> bool:
        """Whether the tensors `names` of a file have an embedding or a head, and not for modules_to_save."""
        outer = {name.removeprefix(PREFIX).removesuffix(".weight") for name in names if name.endswith(OUTER_WEIGHTS)}
        return any(not any(holder.endswith(self.modules_to_save) for holder in holders(name)) for name in outer)

    def description(self, lm: LM) -> dict[str, Any]:
        """What adapter_config.json says of them."""
        names = self.target_modules
        if names == ALL_LINEAR:
            names = tuple(dict.fromkeys(module.short for module, _ in self.matrices(lm)))
        elif isinstance(names, str) and any(module.alias for module, _ in self.matrices(lm)):
            names = tuple(sorted(self.names(lm)))  # HF PEFT does not tie what an expression of whole names means
        return {
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
