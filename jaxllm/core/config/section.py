"""Typed configuration: sections, components chosen by `type:`, reading and writing YAML.

A config is a tree of `Section`s. A section lives beside the code that it configures and states each default
once, as the default of its field; where all fields have one, the section itself can be left out
(`mesh: Mesh = Mesh()`). A check across fields is a pydantic validator that raises ValueError; `load` adds the
file and the line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from jaxllm.core.config.bounds import bound
from jaxllm.core.config.messages import describe
from jaxllm.core.config.yaml_file import ConfigFile, is_mapping, use_core_schema
from jaxllm.core.errors import UserError
from jaxllm.core.registry import Registry

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of a config: immutable, and an unknown key is an error.

    The docstring below a field is its description, which the message about a missing key quotes. A number whose field
    sets no bound has the bounds of `core.config.bounds`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        bound(schema)
        return schema


@dataclass(frozen=True)
class ByType:
    """Makes a field hold any section of `registry`, chosen by its `type:` key.

    Use as `optim: Annotated[OptimSection, ByType(OPTIMIZERS)]`, where `OptimSection` is what the entries have
    in common. Each entry is a Section with a field `type: Literal["its name"]`. The registry is read when the
    class with the field is created, so the modules that register components are imported before it.
    `otherwise` is the section that a mapping without `type:` is (such as `model: {path: …}`).
    """

    registry: Registry[Any]
    otherwise: type[Section] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(self.registry[name]) for name in self.registry}
        if self.otherwise is None:
            return core_schema.tagged_union_schema(choices, discriminator="type")
        choices[_WITHOUT_TYPE] = handler.generate_schema(self.otherwise)
        return core_schema.tagged_union_schema(choices, discriminator=_type_or_none)


_WITHOUT_TYPE = "(without type)"


def _type_or_none(value: Any) -> Any:
    name = value.get("type") if is_mapping(value) else getattr(value, "type", None)
    return _WITHOUT_TYPE if name is None else name


def load(path: str | Path, overrides: Sequence[str], schema: type[S]) -> S:
    """The config in the YAML file `path`, changed by `overrides` (`"section.key=value"`), as a `schema`.

    Scalars follow the core schema of YAML 1.2: `1e-4` is a number, `yes` and `on` are text, dates are text.
    Values of overrides are YAML too. `evals.0.every=10` changes an item of a list; the index after the
    last adds one. Lists may fill tuples and text may fill paths, everything else is strict.

    Raises UserError listing every problem, one a line, each with the file and line (or `command line`) that
    set it and the nearest known key or value.
    """
    file = ConfigFile.read(Path(path))
    for override in overrides:
        file.override(override)
    try:
        return schema.model_validate_json(json.dumps(file.data))
    except ValidationError as error:
        raise UserError("\n".join(describe(error, schema, file))) from None


def dump(config: Section) -> str:
    """`config` with every default, as YAML in the order of the classes; `load` reads back an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our loader would read as something else."""


def _text(dumper: Any, text: str) -> yaml.ScalarNode:
    # PyYAML folds the rarer line breaks (U+0085) into spaces unless they are escaped in double quotes.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


use_core_schema(_Dumper)
_Dumper.add_representer(str, _text)
