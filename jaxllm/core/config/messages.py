"""What is wrong with a config: pydantic's problems as lines that name place, key and remedy."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxllm.core.config.bounds import at_most
from jaxllm.core.config.yaml_file import ConfigFile, Loc, dotted, is_list, is_mapping, shown
from jaxllm.core.errors import did_you_mean, nearest

Node = dict[str, Any]  # a node of pydantic's core schema


@functools.cache
def foreign_names() -> dict[str, list[str]]:
    """What other trainers call things → our keys for it."""
    return ConfigFile.read(Path(__file__).with_name("foreign_names.yaml")).data


_KINDS = {  # of pydantic's schema nodes; an error of type `int_type` means that an `int` was wanted
    "bool": "true or false",
    "dict": "a section of keys and values",
    "float": "a number",
    "int": "a whole number",
    "lax-or-strict": "a path",
    "list": "a list",
    "model": "a section of keys and values",
    "str": "text",
    "string": "text",
    "tagged-union": "a section of keys and values",
    "tuple": "a list",
}


def describe(error: ValidationError, schema: type[BaseModel], file: ConfigFile) -> list[str]:
    """One line for each wrong key of `file`, in the order of its lines."""
    known = _Schema(schema)
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


def _problem(detail: ErrorDetails, known: "_Schema", data: Any) -> tuple[Loc, str]:
    """The place in the file and what is wrong there."""
    loc, nodes = known.resolve(detail["loc"])
    given, context = detail["input"], detail.get("ctx", {})
    kind = detail["type"].removesuffix("_type").removesuffix("_attributes")
    match detail["type"]:
        case "extra_forbidden":
            return loc, _unknown_key(loc, nodes[-2], known, data)
        case "missing":
            return loc, f"required, but missing: {known.meaning(nodes[-2], str(loc[-1]))}"
        case "union_tag_not_found":
            return (*loc, "type"), f"required, but missing: one of {', '.join(known.types(nodes[-1]))}"
        case "union_tag_invalid":
            name, types = context["tag"], known.types(nodes[-1])
            hint = did_you_mean(name, types)
            section = next(key for key in reversed(loc) if isinstance(key, str))  # of an item of a list, the list
            return (*loc, "type"), f"there is no {section} type {name!r}.{hint} Known: {', '.join(types)}."
        case "literal_error":
            values = [str(value) for value in nodes[-1].get("expected", ())]
            hint = did_you_mean(str(given), values)
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


def _unknown_key(loc: Loc, section: Node, known: "_Schema", data: Any) -> str:
    """Names the key that was meant: what another trainer calls so, the same name elsewhere, or a close name.

    An exact name says more than a close one: `save_steps` means `checkpoint.every`, not `train.steps`.
    """
    *outer, name = (str(key) for key in loc)
    given = data
    for key in loc[:-1]:
        given = given[key]
    what = f"unknown key for type {given['type']!r}" if "type" in given else "unknown key"
    keys = list(dict.fromkeys(known.keys(data)))
    last = {key: key.rpartition(".")[2] for key in keys}

    targets = foreign_names().get(name, ())
    if targets and set(targets) <= set(keys):
        if len(targets) > 1:
            return f"{what}; it follows from {' and '.join(repr(target) for target in targets)}"
        meant = list(targets)
    elif name in last.values():
        meant = [key for key in keys if last[key] == name]
    elif beside := nearest(name, _fields(section)):
        meant = [".".join((*outer, beside))]
    elif elsewhere := nearest(name, last.values(), cutoff=0.75):
        meant = [key for key in keys if last[key] == elsewhere]
    else:
        return f"{what}. Known here: {', '.join(_fields(section))}."
    return f"{what}. Did you mean {' or '.join(repr(key) for key in meant[:3])}?"


def _fields(model: Node) -> dict[str, Node]:
    """Name → node of the fields of a section, whose validators are wrapped around them."""
    while "fields" not in model:
        model = model["schema"]
    return model["fields"]


class _Schema:
    """The keys that a Section class knows, read from pydantic's core schema."""

    def __init__(self, schema: type[BaseModel]) -> None:
        root = cast(Node, schema.__pydantic_core_schema__)
        self._named: dict[str, Node] = {node["ref"]: node for node in root.get("definitions", ())}
        self._root = self._core(root)

    def _core(self, node: Node) -> Node:
        """The section, union, list or scalar inside wrappers such as defaults, validators and `| None`."""
        while node["type"] != "model":
            if node["type"] == "definition-ref":
                node = self._named[node["schema_ref"]]
            elif "schema" in node:
                node = node["schema"]
            else:
                break
        return node

    def _inner(self, node: Node, key: str | int) -> Node:
        """What the section, list or mapping `node` has at `key`."""
        match node["type"]:
            case "model":
                inner = _fields(node).get(str(key), {"type": "unknown"})
            case "list":
                inner = node["items_schema"]
            case "tuple":
                inner = node["items_schema"][min(int(key), len(node["items_schema"]) - 1)]
            case _:
                inner = node.get("values_schema", {"type": "unknown"})
        return self._core(inner)

    def resolve(self, loc: Loc) -> tuple[Loc, list[Node]]:
        """The keys of pydantic's `loc` without its names of union members; the nodes from root to last."""
        path: Loc = ()
        nodes = [self._root]
        for key in loc:
            match nodes[-1]["type"]:
                case "tagged-union":
                    nodes[-1] = self._core(nodes[-1]["choices"][key])
                case "union":
                    nodes[-1] = next(
                        (choice for choice in self._choices(nodes[-1]) if _has_label(choice, str(key))),
                        nodes[-1],
                    )
                case _ if key == "[key]":  # the key of a mapping, not its value, is wrong
                    pass
                case _:
                    path = (*path, key)
                    nodes.append(self._inner(nodes[-1], key))
        return path, nodes

    def _choices(self, union: Node) -> list[Node]:
        choices: Any = union["choices"]
        return [self._core(choice) for choice in (choices.values() if is_mapping(choices) else choices)]

    def types(self, union: Node) -> list[str]:
        """The values of `type:` in a union of components (the member without `type` has none)."""
        return sorted(name for name, node in union["choices"].items() if "type" in _fields(self._core(node)))

    def keys(self, data: Any, node: Node | None = None, prefix: str = "") -> Iterator[str]:
        """The dotted names of all keys; of a component, those of the type that `data` chooses, or all."""
        node = node or self._root
        match node["type"]:
            case "model":
                for name in _fields(node):
                    yield prefix + name
                    inner = data.get(name) if is_mapping(data) else None
                    yield from self.keys(inner, self._inner(node, name), f"{prefix}{name}.")
            case "list" | "tuple":
                inner = data[0] if is_list(data) and data else None
                yield from self.keys(inner, self._inner(node, 0), f"{prefix}0.")
            case "tagged-union":
                find = node["discriminator"]
                chosen: Any = None
                if is_mapping(data):
                    chosen = data.get(find) if isinstance(find, str) else find(data)
                choice = node["choices"].get(str(chosen))
                for inner in [self._core(choice)] if choice else self._choices(node):
                    yield from self.keys(data, inner, prefix)
            case "union":
                for inner in self._choices(node):
                    yield from self.keys(data, inner, prefix)
            case _:
                pass

    def meaning(self, section: Node, name: str) -> str:
        """What a key is: the docstring below its field, and the kind of its value."""
        in_model = section["type"] == "model"  # and not in a tuple, whose items have no names
        description = section["cls"].model_fields[name].description if in_model else None
        kind = _KINDS.get(self._inner(section, name)["type"])
        first = " ".join(description.partition("\n\n")[0].split()).rstrip(".") if description else ""
        return f"{first} ({kind})" if first and kind else first or kind or "it has no default"


def _has_label(node: Node, label: str) -> bool:
    """Whether pydantic calls this member of a plain union `label`, as in `int`, `list[str]`, `Schedule`."""
    return label.startswith(node["type"]) or (node["type"] == "model" and node["cls"].__name__ in label)
