"""Every key of a config as text, with its default and meaning."""

from jaxllm.core.config.keys import Key, Value, keys
from jaxllm.core.config.section import Section


def reference(schema: type[Section]) -> str:
    """The keys of `schema` as text: one a line, with its default and what it means."""
    lines: list[str] = []
    for key in settings(schema):
        of_type = f"[{key.type}] " if key.type else ""
        lines.append(f"  {key.name:<34} {key.default:<12} {of_type}{key.meaning}".rstrip())
    return "\n".join(lines)


def settings(schema: type[Section]) -> list[Key]:
    """The keys of `schema` that hold a value of their own, and not just the keys below them."""
    return [key for key in keys(Value(schema)) if key.field is None or not _holds_keys(key.value)]


def _holds_keys(value: Value) -> bool:
    return not value.optional and (value.name == "model")
