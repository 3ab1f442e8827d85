"""A YAML file as plain data that remembers where every key came from."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import yaml

from jaxllm.core.config.bounds import INTEGERS, text_fault
from jaxllm.core.errors import UserError, did_you_mean

Loc = tuple[str | int, ...]

COMMAND_LINE = math.inf
LARGEST_FILE = 16 << 20  # bytes

_TAG = "tag:yaml.org,2002:"

# The scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2, section 10.3.2): what they are, how they
# look, and the characters that they may start with.
_CORE_SCHEMA = [
    (_TAG + "null", re.compile(r"^(null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    (_TAG + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_TAG + "int", re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        _TAG + "float",
        re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+.0123456789"),
    ),
]


def use_core_schema(loader_or_dumper: Any) -> None:
    """Teaches a PyYAML class the scalars of YAML 1.2, beside those that it knows."""
    for tag, pattern, first in _CORE_SCHEMA:
        loader_or_dumper.add_implicit_resolver(tag, pattern, first)


def is_mapping(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def dotted(loc: Loc) -> str:
    """`("evals", 0, "every")` → `"evals.0.every"`, as an override would be written."""
    return ".".join(str(key) for key in loc)


def shown(value: Any) -> str:
    """A value as a message quotes it: short, and as YAML would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _cut(repr(value))


class ConfigFile:
    """The data of one YAML file with overrides; knows which line, or the command line, set each key."""

    def __init__(self, name: str, text: str) -> None:
        """Raises UserError for text that is not YAML, or not a mapping."""
        self.name = name
        document = _Document(text)
        if document.problems:
            raise UserError("\n".join(f"{name}:{line}: {what}" for line, what in document.problems))
        self._lines: dict[Loc, float] = {**document.lines}
        if document.value is None:
            raise UserError(f"{name}: is empty; a config is a YAML file of `section: {{key: value}}`.")
        if not is_mapping(document.value):
            raise UserError(f"{name}: must be `key: value` lines, got {shown(document.value)}.")
        self.data: dict[str, Any] = document.value

    @classmethod
    def read(cls, path: Path) -> "ConfigFile":
        """Raises UserError when there is no such file or it is not UTF-8 text."""
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise UserError(
                    f"{path}: has more than {LARGEST_FILE >> 20} MiB, too large for a config; give its YAML file."
                )
            return cls(str(path), path.read_bytes().decode("utf-8-sig"))
        except FileNotFoundError:
            siblings = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
            hint = did_you_mean(str(path), map(str, siblings))
            raise UserError(f"{path}: there is no such config file.{hint}") from None
        except IsADirectoryError:
            raise UserError(f"{path}: is a folder; give the YAML file in it.") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
        except ValueError:  # a name with NUL
            raise UserError(f"{str(path)!r}: is no file name; give the YAML file of a config.") from None

    def override(self, text: str) -> None:
        """Sets one key from `section.key=value`; sections and list items on the way appear as needed.

        The value is YAML, in which a text needs no quotes: what YAML would cut from it, such as a comment, belongs
        to the text.
        """
        key, equals, value = text.partition("=")
        keys = key.split(".")
        if not equals or key.startswith("-") or not all(keys):
            raise UserError(f"command line: {text!r} is no override; write section.key=value, such as train.steps=100.")
        document = _Document(value, typed=True)
        if document.problems:
            why = document.problems[0][1]
            quote = f" To mean text, quote it: {key}='\"{value}\"'." if document.can_quote and len(value) <= 200 else ""
            raise UserError(f"command line: {key}: {why}{quote}")
        self._put(self.data, (), keys, document.value)

    def _put(self, container: Any, at: Loc, keys: list[str], value: Any) -> None:
        key = self._slot(container, at, keys)
        here, rest = (*at, key), keys[1:]
        if not rest:
            container[key] = value
            self._lines = {loc: line for loc, line in self._lines.items() if loc[: len(here)] != here}
            self._lines[here] = COMMAND_LINE
            return
        if container[key] is None:
            container[key] = [] if rest[0].isdecimal() else {}
            self._lines[here] = COMMAND_LINE
        self._put(container[key], here, rest, value)

    def _slot(self, container: Any, at: Loc, keys: list[str]) -> str | int:
        """The first of `keys` as a key of `container`, which has it afterwards."""
        name, wanted = keys[0], f"command line: {dotted((*at, *keys))}"
        if is_mapping(container):
            container.setdefault(name, None)
            return name
        if not is_list(container):
            raise UserError(f"{wanted}: {dotted(at)} is {shown(container)}, not a section.")
        if not (name.isdecimal() and int(name) <= len(container)):
            raise UserError(
                f"{wanted}: {dotted(at)} is a list of {len(container)}; "
                f"write an index from 0 to {len(container)} (the last adds an item), got {name!r}."
            )
        if int(name) == len(container):
            container.append(None)
        return int(name)

    def line(self, loc: Loc) -> float:
        """The line of a key or of the innermost section around it; 0: the file, infinity: command line."""
        return next((self._lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self._lines), 0)

    def where(self, loc: Loc) -> str:
        """`line` as messages name it: `config.yaml:12`, `config.yaml` or `command line`."""
        line = self.line(loc)
        if line == COMMAND_LINE:
            return "command line"
        return f"{self.name}:{line}" if line else self.name


class _Loader(yaml.SafeLoader):
    """Knows the scalars of YAML 1.2 alone."""

    yaml_implicit_resolvers: ClassVar[Any] = {}
    comments = False  # whether there were any

    def scan_to_next_token(self) -> None:
        start = self.pointer
        super().scan_to_next_token()
        self.comments |= "#" in self.buffer[start : self.pointer]


use_core_schema(_Loader)


class _Document:
    """One YAML document: its `value`, the `lines` of keys and list items, `problems` as (line, message).

    Anchors, aliases and tags are refused: they let a short file grow without bound, or name Python objects.
    """

    def __init__(self, text: str, *, typed: bool = False) -> None:
        """typed: `text` is the value of an override, as somebody typed it."""
        self.lines: dict[Loc, int] = {}
        self.problems: list[tuple[int, str]] = []
        self.can_quote = True  # whether quotes would make a text of what is wrong
        self._seen: set[int] = set()
        self.value: Any = None
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if typed and _cuts_text(node, text):
                node = yaml.ScalarNode(_TAG + "str", text, loader.get_mark())
            elif typed and loader.comments:
                self.problems.append((1, "what follows the # would be a comment; leave it out."))
                self.can_quote = False
            self.value = None if node is None else self._build(node, ())
        except yaml.YAMLError as error:
            self.problems.append(_syntax_problem(error))
        except RecursionError:
            self.problems.append((1, "nests lists or sections too deeply; a config has about five levels."))

    def _problem(self, node: yaml.Node, loc: Loc, what: str, can_quote: bool = True) -> None:
        self.can_quote &= can_quote
        self.problems.append((node.start_mark.line + 1, f"{dotted(loc)}: {what}" if loc else what))

    def _build(self, node: yaml.Node, loc: Loc) -> Any:
        if id(node) in self._seen:
            what = f"{dotted(loc)}: YAML aliases (*name) are not supported; write the value out."
            self.problems.append((self.lines[loc], what))  # the node is where the anchor is
            return None
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return {key: self._build(child, (*loc, key)) for key, child in self._items(node, loc)}
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            for index, child in enumerate(node.value):
                self.lines[(*loc, index)] = child.start_mark.line + 1
            return [self._build(child, (*loc, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, loc)
        return self._problem(node, loc, f"YAML tags ({node.tag}) are not supported.")

    def _items(self, node: yaml.MappingNode, loc: Loc) -> Iterator[tuple[str, yaml.Node]]:
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, loc, "a key must be a name.")
                continue
            key = key_node.value
            here = (*loc, key)
            if here in self.lines:
                self._problem(key_node, here, f"is given twice; the first is in line {self.lines[here]}.")
                continue
            self.lines[here] = key_node.start_mark.line + 1
            if (fault := text_fault(key)) is not None:
                self._problem(key_node, loc, f"the key {key!r} {fault}", can_quote=False)
            yield key, child

    def _scalar(self, node: yaml.ScalarNode, loc: Loc) -> Any:
        text = node.value
        try:
            match node.tag.removeprefix(_TAG):
                case "str":
                    if (fault := text_fault(text)) is not None:
                        self._problem(node, loc, fault, can_quote=False)
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                    if abs(number) > INTEGERS:
                        too_large = f"{_cut(text)} is too large for any setting; write a smaller number."
                        self._problem(node, loc, too_large, can_quote=False)
                    return number
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                case _:
                    self._problem(node, loc, f"YAML tags ({node.tag}) are not supported.")
        except (ValueError, KeyError):
            self._problem(node, loc, f"{shown(text)} is no {node.tag.removeprefix(_TAG)}.")
        return None


def _cuts_text(node: yaml.Node | None, text: str) -> bool:
    """Whether YAML reads a `text` without quotes, of which `node` is the value, as less than it is: it drops comments,
    line ends and `---`."""
    if node is None:
        return bool(text)
    quoted_or_tagged = text.lstrip(" ").startswith(('"', "'", "!", "&", "*"))
    is_block = isinstance(node, yaml.ScalarNode) and node.style is not None and "\n" in text
    return isinstance(node, yaml.ScalarNode) and not (quoted_or_tagged or is_block) and node.value != text.strip(" ")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _syntax_problem(error: yaml.YAMLError) -> tuple[int, str]:
    """The (line, message) of a YAML error."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return 1, f"not valid YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    why = ", ".join(part for part in (error.context, error.problem) if part)
    remedy = " Indent with spaces, not tabs." if r"'\t'" in why else ""
    return (mark.line + 1 if mark else 1), f"not valid YAML: {why}.{remedy}"
