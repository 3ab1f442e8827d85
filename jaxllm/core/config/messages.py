"""What is wrong with a config: pydantic's problems as lines that name place, key and remedy."""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxllm.core.config.keys import Value, keys, resolve
from jaxllm.core.config.requirement import KINDS, kind_of, requirement
from jaxllm.core.config.yaml_file import ConfigFile, Loc, dotted, shown
from jaxllm.core.errors import did_you_mean, nearest


@functools.cache
def foreign_names() -> dict[str, list[str]]:
    """What other trainers call things → our keys for it."""
    return ConfigFile.read(Path(__file__).with_name("foreign_names.yaml")).data


def describe(error: ValidationError, schema: type[BaseModel], file: ConfigFile) -> list[str]:
    """One line for each wrong key of `file`, in the order of its lines."""
    known = Value(schema)
    own: defaultdict[Loc, list[str]] = defaultdict(list)
    plain: defaultdict[Loc, list[ErrorDetails]] = defaultdict(list)
    hints: dict[Loc, str] = {}
    for detail in error.errors(include_url=False):
        loc, values = resolve(known, detail["loc"])
        match detail["type"]:
            case "extra_forbidden":
                own[loc].append(_unknown_key(loc, values[-2], known, file.data))
            case "missing":
                own[loc].append(f"{requirement(detail)}: {_meaning(values[-2], str(loc[-1]))}")
            case "value_error":
                own[loc].append(requirement(detail))
            case "union_tag_not_found" | "union_tag_invalid":
                own[(*loc, "type")].append(_unknown_type(detail, loc, values[-1]))
            case _:
                own.setdefault(loc, [])  # problems of one line keep pydantic's order
                plain[loc].append(detail)
                hints[loc] = _hint(detail, values[-1])
    for loc, details in plain.items():
        hint = hints[loc] if len(details) == 1 else ""
        own[loc].append(f"{requirement(*details)}, got {shown(details[0]['input'])}{hint}")
    return [
        ": ".join(filter(None, (file.where(loc), dotted(loc), "; ".join(own[loc]))))
        for loc in sorted(own, key=file.line)
    ]


def _unknown_type(detail: ErrorDetails, loc: Loc, component: Value) -> str:
    types = [] if component.by_type is None else sorted(component.by_type.registry)
    if detail["type"] == "union_tag_not_found":
        return f"required, but missing: one of {', '.join(types)}"
    name = detail.get("ctx", {})["tag"]
    section = next(key for key in reversed(loc) if isinstance(key, str))  # of an item of a list, the list
    return f"there is no {section} type {name!r}.{did_you_mean(name, types)} Known: {', '.join(types)}."


def _hint(detail: ErrorDetails, value: Value) -> str:
    """What to write instead, where it is plain."""
    kind, given = kind_of(detail), detail["input"]
    if kind == "int" and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind == "bool" and str(given).lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if str(given).lower() in ('yes', 'on') else 'false'}"
    if kind == "string" and isinstance(given, int | float):
        return f"; to mean the text, write '{shown(given)}' with the quotes"
    if kind == "literal_error" and (meant := did_you_mean(str(given), map(str, get_args(value.kind)))):
        return f".{meant}"
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


def _meaning(section: Value, name: str) -> str:
    """What a key is: the docstring below its field, and the kind of its value."""
    field = section.fields.get(name)  # None: it is an item of a tuple
    kind = KINDS.get(section.inner(name).name)
    description = (field and field.description) or ""
    first = " ".join(description.partition("\n\n")[0].split()).rstrip(".")
    return f"{first} ({kind})" if first and kind else first or kind or "it has no default"
