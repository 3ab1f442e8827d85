"""What is wrong with a config: pydantic's problems as lines that name place, key and remedy."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxllm.core.config.bounds import at_most
from jaxllm.core.config.keys import Value, keys, resolve
from jaxllm.core.config.yaml_file import ConfigFile, Loc, dotted, shown
from jaxllm.core.errors import did_you_mean, nearest


@functools.cache
def foreign_names() -> dict[str, list[str]]:
    """What other trainers call things → our keys for it."""
    return ConfigFile.read(Path(__file__).with_name("foreign_names.yaml")).data


_KINDS = {  # by pydantic's names; an error of type `int_type` means that an `int` was wanted
    "bool": "true or false",
    "dict": "a section of keys and values",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a section of keys and values",
    "path": "a path",
    "str": "text",
    "string": "text",
    "tuple": "a list",
}


def describe(error: ValidationError, schema: type[BaseModel], file: ConfigFile) -> list[str]:
    """One line for each wrong key of `file`, in the order of its lines."""
    known = Value(schema)
    problems: defaultdict[Loc, list[str]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        loc, what = _problem(detail, known, file.data)
        problems[loc].append(what)
    return [
        ": ".join(filter(None, (file.where(loc), dotted(loc), _joined(problems[loc]))))
        for loc in sorted(problems, key=file.line)
    ]


def _joined(whats: list[str]) -> str:
    """One sentence for a key: a field of several kinds (`int | str`) fails once for each."""
    if len(whats) == 1 or not all(what.startswith("must be ") for what in whats):
        return "; ".join(whats)
    wanted = [what.partition(", got ")[0].removeprefix("must be ") for what in whats]
    return f"must be {' or '.join(wanted)}, got {whats[0].partition(', got ')[2].partition('; ')[0]}"


def _problem(detail: ErrorDetails, known: Value, data: Any) -> tuple[Loc, str]:
    """The place in the file and what is wrong there."""
    loc, values = resolve(known, detail["loc"])
    given, context = detail["input"], detail.get("ctx", {})
    kind = detail["type"].removesuffix("_type").removesuffix("_attributes")
    match detail["type"]:
        case "extra_forbidden":
            return loc, _unknown_key(loc, values[-2], known, data)
        case "missing":
            return loc, f"required, but missing: {_meaning(values[-2], str(loc[-1]))}"
        case "union_tag_not_found":
            return (*loc, "type"), f"required, but missing: one of {', '.join(_types(values[-1]))}"
        case "union_tag_invalid":
            name, types = context["tag"], _types(values[-1])
            hint = did_you_mean(name, types)
            section = next(key for key in reversed(loc) if isinstance(key, str))  # of an item of a list, the list
            return (*loc, "type"), f"there is no {section} type {name!r}.{hint} Known: {', '.join(types)}."
        case "literal_error":
            hint = did_you_mean(str(given), map(str, get_args(values[-1].kind)))
            return loc, f"must be {context['expected']}, got {shown(given)}{hint and '.' + hint}"
        case "value_error":
            return loc, str(context["error"])
        case "less_than_equal":
            return loc, f"must be {at_most(context['le'])}, got {shown(given)}"
        case _ if kind in _KINDS:
            return loc, f"must be {_KINDS[kind]}, got {shown(given)}{_conversion(kind, given)}"
        case _:
            wanted = detail["msg"].partition(" should ")[2] or detail["msg"]
            return loc, f"must {wanted.replace(' after validation', '')}, got {shown(given)}"


def _conversion(kind: str, given: Any) -> str:
    """What to write instead, where it is plain."""
    if kind == "int" and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind == "bool" and str(given).lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if str(given).lower() in ('yes', 'on') else 'false'}"
    if kind == "string" and isinstance(given, int | float):
        return f"; to mean the text, write '{shown(given)}' with the quotes"
    return ""


def _unknown_key(loc: Loc, section: Value, known: Value, data: Any) -> str:
    """Names the key that was meant: what another trainer calls so, the same name elsewhere, or a close name.

    An exact name says more than a close one: `save_steps` means `checkpoint.every`, not `train.steps`.
    """
    *outer, name = (str(key) for key in loc)
    given = data
    for key in loc[:-1]:
        given = given[key]
    what = f"unknown key for type {given['type']!r}" if "type" in given else "unknown key"
    last = {key.name: key.name.rpartition(".")[2] for key in keys(known, data)}

    targets = foreign_names().get(name, ())
    if targets and set(targets) <= last.keys():
        if len(targets) > 1:
            return f"{what}; it follows from {' and '.join(repr(target) for target in targets)}"
        meant = list(targets)
    elif name in last.values():
        meant = [key for key, its in last.items() if its == name]
    elif beside := nearest(name, section.fields):
        meant = [".".join((*outer, beside))]
    elif elsewhere := nearest(name, last.values(), cutoff=0.75):
        meant = [key for key, its in last.items() if its == elsewhere]
    else:
        return f"{what}. Known here: {', '.join(section.fields)}."
    return f"{what}. Did you mean {' or '.join(repr(key) for key in meant[:3])}?"


def _types(component: Value) -> list[str]:
    return [] if component.by_type is None else sorted(component.by_type.registry)


def _meaning(section: Value, name: str) -> str:
    """What a key is: the docstring below its field, and the kind of its value."""
    field = section.fields.get(name)  # None: it is an item of a tuple
    kind = _KINDS.get(section.inner(name).name)
    description = (field and field.description) or ""
    first = " ".join(description.partition("\n\n")[0].split()).rstrip(".")
    return f"{first} ({kind})" if first and kind else first or kind or "it has no default"
