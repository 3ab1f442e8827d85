"""The keys of a config, read off the annotations of its classes."""

import json
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from jaxllm.core.config.section import WITHOUT_TYPE, ByType
from jaxllm.core.config.yaml_file import Loc, is_list, is_mapping


class Value:
    """What a key may hold: sections of `by_type`, or one of `kinds`, each by the name that pydantic's errors give it.

    A kind is a section, a scalar's class, or a generic such as `list[str]`. `optional`: null will do.
    """

    def __init__(self, annotation: Any, marks: Iterable[Any] = ()) -> None:
        self.by_type = next((mark for mark in marks if isinstance(mark, ByType)), None)
        self.optional = False
        self.kinds: list[tuple[str, Any]] = []
        self._add(annotation, next((mark.tag for mark in marks if isinstance(mark, Tag)), None))

    def _add(self, annotation: Any, tag: str | None = None) -> None:
        if get_origin(annotation) is Annotated:
            inner, *marks = get_args(annotation)
            found = Value(inner, marks)
            self.by_type = self.by_type or found.by_type
            self.optional |= found.optional
            self.kinds += found.kinds
        elif get_origin(annotation) in (Union, UnionType):
            for member in get_args(annotation):
                self._add(member)
        elif annotation is type(None):
            self.optional = True
        else:
            self.kinds.append((tag or _name(annotation), annotation))

    @property
    def kind(self) -> Any:
        """The kind, if there is one; None for a component, and where there are several."""
        return self.kinds[0][1] if self.by_type is None and len(self.kinds) == 1 else None

    @property
    def name(self) -> str:
        """The name of the kind in pydantic's errors, `model` for any section; "" where there are several."""
        if self.by_type is not None or is_section(self.kind):
            return "model"
        return self.kinds[0][0].lower() if len(self.kinds) == 1 else ""

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The fields, if this is one section."""
        return self.kind.model_fields if is_section(self.kind) else {}

    def inner(self, key: str | int) -> "Value":
        """What stands at `key` of this section, list or mapping."""
        if (field := self.fields.get(str(key))) is not None:
            return Value(field.annotation, field.metadata)
        items = [item for item in get_args(self.kind) if item is not Ellipsis]
        if get_origin(self.kind) is dict or not items:
            return Value(items[-1] if items else Any)
        return Value(items[min(int(key), len(items) - 1)])

    def member(self, name: str | int) -> "Value":
        """The section of the type, or the kind, that pydantic calls `name`."""
        if self.by_type is not None:
            otherwise = self.by_type.otherwise if name == WITHOUT_TYPE else None
            return Value(otherwise or self.by_type.registry[str(name)])
        plain = str(name).removeprefix("constrained-")
        for label, kind in self.kinds:
            if plain.startswith(label) or (is_section(kind) and label in plain):
                return Value(kind)
        return self


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, BaseModel)


def _name(kind: Any) -> str:
    origin = get_origin(kind)
    return "literal" if origin is Literal else getattr(origin or kind, "__name__", "any")


class Key(NamedTuple):
    """A key such as `train.batch_size`; of a component also the `type:` it belongs to, if not to all."""

    name: str
    type: str | None
    value: Value
    field: FieldInfo | None  # None: it is the key `type` of a component

    @property
    def default(self) -> str:
        if self.field is None:
            return "-"
        if self.field.is_required():
            return "required"
        return json.dumps(to_jsonable_python(self.field.get_default(call_default_factory=True)))

    @property
    def meaning(self) -> str:
        if self.field is None and self.value.by_type is not None:
            return "one of " + ", ".join(self.value.by_type.registry)
        return " ".join(((self.field and self.field.description) or "").split())


def keys(value: Value, data: Any = None, prefix: str = "", component: str | None = None) -> Iterator[Key]:
    """The keys below `value`, in order; in a list, an item's keys stand below the index 0.

    data: what a file says there. A component has the keys of the type that `data` chooses, or else of all its types.
    """
    if value.by_type is not None:
        yield from _component_keys(value, value.by_type, data, prefix)
        return
    for _, kind in value.kinds:
        if is_section(kind):
            section = Value(kind)
            for name in kind.model_fields:
                inner, given = section.inner(name), data.get(name) if is_mapping(data) else None
                if name != "type":
                    yield Key(f"{prefix}{name}", component, inner, kind.model_fields[name])
                yield from keys(inner, given, f"{prefix}{name}.", component)
        elif get_origin(kind) in (list, tuple):
            first = data[0] if is_list(data) and data else None
            yield from keys(Value(kind).inner(0), first, f"{prefix}0.", component)


def _component_keys(value: Value, by_type: ByType, data: Any, prefix: str) -> Iterator[Key]:
    """The keys of a component: those that all types have once, the others under their type."""
    choices = _choices(by_type, data)
    if (otherwise := choices.pop(None, None)) is not None:
        yield from keys(Value(otherwise), data, prefix)
    if not choices:
        return
    yield Key(f"{prefix}type", None, value, None)
    shared = set.intersection(*(set(choice.model_fields) for choice in choices.values()))
    everywhere = shared if len(choices) > 1 else set[str]()
    for number, (name, choice) in enumerate(choices.items()):
        for key in keys(Value(choice), data, prefix, name):
            first = key.name.removeprefix(prefix).partition(".")[0]
            if first not in everywhere:
                yield key
            elif number == 0:
                yield key._replace(type=None if key.type == name else key.type)


def _choices(by_type: ByType, data: Any) -> dict[str | None, type[BaseModel]]:
    """The sections by type that `data` may mean, below None that without a type."""
    known: dict[str | None, type[BaseModel]] = {name: by_type.registry[name] for name in by_type.registry}
    if by_type.otherwise is not None:
        known[None] = by_type.otherwise
    chosen = data.get("type") if is_mapping(data) else WITHOUT_TYPE
    is_known = (chosen is None or isinstance(chosen, str)) and chosen in known
    return {chosen: known[chosen]} if is_known else known


def resolve(value: Value, loc: Loc) -> tuple[Loc, list[Value]]:
    """The keys of pydantic's `loc` below `value` without its names of union members; the values from root to last."""
    path: Loc = ()
    values = [value]
    for key in loc:
        if values[-1].by_type is not None or len(values[-1].kinds) > 1:
            values[-1] = values[-1].member(key)
        elif key != "[key]":  # the key of a mapping, not its value, is wrong
            path = (*path, key)
            values.append(values[-1].inner(key))
    return path, values
