"""Which family a `config.json` is of, and what of it is refused before its fields are read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.core.errors import UserError
from jaxllm.hf.fields import CODE, QUANTIZED, names_of, sort_fields
from jaxllm.hf.rope import shown
from jaxllm.models import FAMILIES
from jaxllm.models.family import Family

# Without one of these a config.json describes its model in names of its own.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def family_of(raw: Mapping[str, Any], file: str | Path) -> Family:
    """The family of `architectures`, or where that is absent of `model_type`.

    Raises UserError for an architecture that is not implemented; then for one whose code is to come with the
    checkpoint; then for quantised weights.
    """
    family = _named(raw, file)
    _check_code(raw, family, file)
    for name in QUANTIZED:
        if raw.get(name):
            raise UserError(
                f"{file}: {name} = {shown(raw[name])} is refused: quantised weights are not implemented; use the "
                "checkpoint before quantisation"
            )
    return family


def _named(raw: Mapping[str, Any], file: str | Path) -> Family:
    families = [FAMILIES[name] for name in FAMILIES]
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if architectures:
        # The first Llamas were called LLaMAForCausalLM.
        known = {name.lower(): family for family in families for name in family.architectures}
        what = "architecture"
        one = isinstance(architectures, list) and len(architectures) == 1
        given = architectures[0] if one else architectures
    elif model_type is not None:
        known, what, given = {family.model_type: family for family in families}, "model_type", model_type
    else:
        raise UserError(f"{file}: names neither `architectures` nor a `model_type`: which model is this?")
    if not isinstance(given, str) or given.lower() not in known:
        names = sorted(family.architectures[0] for family in families)
        raise UserError(
            f"{file}: the {what} {shown(given)} is not implemented (those that are: {', '.join(names)}). "
            f"{_nearest(raw, families)} The README says how to add one, under “Adding a model family”."
        )
    family = known[given.lower()]
    if model_type is not None and model_type != family.model_type:
        raise UserError(
            f"{file}: architectures = {shown(given)} and model_type = {shown(model_type)} contradict each "
            f"other; the model_type of {given} is {family.model_type}"
        )
    return family


def _nearest(raw: Mapping[str, Any], families: list[Family]) -> str:
    """Which of the families lacks the fewest fields of `raw`, and which those are; of equals, the one that does the
    fewest things by default which `raw` does not ask for."""
    lacking = [name for name in _SIZES if raw.get(name) is None]
    if len(lacking) > 1:
        return f"None of them is near: its config has no {' and no '.join(lacking)}."

    def unasked(family: Family) -> int:
        absent = (ours for theirs, ours in names_of(family).items() if theirs not in raw)
        return sum(bool(family.defaults.get(ours)) for ours in absent)

    refused = [(family, sort_fields(raw, family).refused) for family in families]
    family, fields = min(refused, key=lambda each: (len(each[1]), unasked(each[0])))
    few = [f"{field} = {shown(value)}" for field, value in fields.items()]
    more = [f"{len(few) - 4} more"] if len(few) > 4 else []
    lacks = f", which lacks {' and '.join([', '.join(few[:4]), *more])}" if few else ""
    return f"The nearest by its fields is {family.architectures[0]}{lacks}; what its fields do not tell may differ too."


def _check_code(raw: Mapping[str, Any], family: Family, file: str | Path) -> None:
    """Raises UserError where `auto_map` names a model other than the family, which is what is computed here.

    Its tokenizer is another file's business.
    """
    code = raw.get(CODE)
    classes = code if isinstance(code, dict) else {"AutoModel": code}
    own = "|".join(name.removesuffix("ForCausalLM") for name in family.architectures)
    ours = rf"({own})(Config|Model|For\w+)"
    for auto, path in classes.items():
        models = re.fullmatch("AutoConfig|AutoModel.*", auto) and path
        if models and not (isinstance(path, str) and re.fullmatch(ours, path.split(".")[-1])):
            raise UserError(
                f"{file}: {CODE} = {shown(code)} is refused: {auto} asks to run code that came with the checkpoint, "
                f"which is never done, and {shown(path)} is no class of {family.architectures[0]}; where it computes "
                "the same, remove the field"
            )
