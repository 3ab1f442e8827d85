"""Every key of a config, with its default and meaning, read off its classes."""

import json
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from jaxllm.core.config.section import ByType, Section


class Key(NamedTuple):
    """A key such as `train.batch_size`; of a component also the `type:` it belongs to, if not to all."""

    name: str
    type: str | None
    default: str
    meaning: str


def keys(schema: type[Section], prefix: str = "", component: str | None = None) -> Iterator[Key]:
    """The keys of `schema`, in order. In a list, an item's keys stand below the index 0."""
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        by_type, of_items = _by_type(field.metadata), [_by_type(get_args(item)) for item in get_args(field.annotation)]
        if by_type is not None:
            yield from _component_keys(by_type, f"{path}.")
        elif of_items and of_items[0] is not None:
            yield _key(path, component, field)
            yield from _component_keys(of_items[0], f"{path}.0.")
        elif (section := _section(field.annotation)) is not None:
            if get_origin(field.annotation) in (Union, UnionType):  # a value instead of the section will do
                yield _key(path, component, field)
            is_list = get_origin(field.annotation) is list
            yield from keys(section, f"{path}.0." if is_list else f"{path}.", component)
        elif name != "type":
            yield _key(path, component, field)


def _component_keys(by_type: ByType, prefix: str) -> Iterator[Key]:
    """The keys of a component: those that all types have once, the others under their type."""
    if by_type.otherwise is not None:
        yield from keys(by_type.otherwise, prefix)
    choices = {name: by_type.registry[name] for name in by_type.registry}
    shared = set.intersection(*(set(choice.model_fields) for choice in choices.values()))
    everywhere = shared if len(choices) > 1 else set[str]()
    yield Key(f"{prefix}type", None, "-", "one of " + ", ".join(choices))
    for number, (name, choice) in enumerate(choices.items()):
        for key in keys(choice, prefix, name):
            first = key.name.removeprefix(prefix).partition(".")[0]
            if first not in everywhere:
                yield key
            elif number == 0:
                yield key._replace(type=None if key.type == name else key.type)


def _key(path: str, component: str | None, field: FieldInfo) -> Key:
    return Key(path, component, _default(field), " ".join((field.description or "").split()))


def _by_type(marks: Iterable[Any]) -> ByType | None:
    return next((mark for mark in marks if isinstance(mark, ByType)), None)


def _section(annotation: Any) -> type[Section] | None:
    for inner in (annotation, *get_args(annotation)):
        inner = get_args(inner)[0] if get_origin(inner) is Annotated else inner
        if isinstance(inner, type) and issubclass(inner, Section):
            return inner
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    return json.dumps(to_jsonable_python(value))


def reference(schema: type[Section]) -> str:
    """The keys of `schema` as text: one a line, with its default and what it means."""
    lines: list[str] = []
    for key in keys(schema):
        of_type = f"[{key.type}] " if key.type else ""
        lines.append(f"  {key.name:<34} {key.default:<12} {of_type}{key.meaning}".rstrip())
    return "\n".join(lines)
