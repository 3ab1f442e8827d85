"""Typed configuration: sections, and components chosen by `type:`.

A config is a tree of `Section`s. A section lives beside the code that it configures and states each default
once, as the default of its field; where all fields have one, the section itself can be left out
(`mesh: Mesh = Mesh()`). A check across fields is a pydantic validator that raises ValueError; `load` adds the
file and the line. A key that may change when a run is resumed says so at its field (`OnResume`).
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from jaxllm.core.config.bounds import bound
from jaxllm.core.config.yaml_file import is_mapping
from jaxllm.core.registry import Registry


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
        choices[WITHOUT_TYPE] = handler.generate_schema(self.otherwise)
        return core_schema.tagged_union_schema(choices, discriminator=_type_or_none)


WITHOUT_TYPE = "(without type)"


def _type_or_none(value: Any) -> Any:
    name = value.get("type") if is_mapping(value) else getattr(value, "type", None)
    return WITHOUT_TYPE if name is None else name
