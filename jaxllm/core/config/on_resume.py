"""What becomes of a run whose config has changed when it is resumed, which each key says itself."""

from collections.abc import Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel


class OnResume(Enum):
    """The mark of a key: `steps: Annotated[int, OnResume.NOTED]`.

    A key without a mark has the mark of the section that it is in. A section without one is REFUSED.
    """

    REFUSED = "the state, or the order of the data, means something else"
    NEW_FOLDER = "training changes: refused, except for a new run that continues from another run's checkpoint"
    NOTED = "the training is the same, but for rounding"
    FREE = "where the run is, which checkpoint it continues from, and how its processes wait for one another"


def marks(
    section: BaseModel, prefix: str = "", inherited: OnResume = OnResume.REFUSED
) -> Iterator[tuple[str, OnResume]]:
    """The keys of a config, such as `data.sources.0.path`, and the mark of each."""
    for name in type(section).model_fields:
        mark = _mark(type(section), name) or inherited
        yield f"{prefix}{name}", mark
        yield from _marks_within(getattr(section, name), f"{prefix}{name}", mark)


def _marks_within(value: Any, key: str, mark: OnResume) -> Iterator[tuple[str, OnResume]]:
    if isinstance(value, BaseModel):
        yield from marks(value, f"{key}.", mark)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _marks_within(item, f"{key}.{i}", mark)


def _mark(section: type[BaseModel], name: str) -> OnResume | None:
    """The mark of a field, which a subclass that narrows the field keeps."""
    for base in section.__mro__:
        if issubclass(base, BaseModel) and name in base.model_fields:
            for mark in base.model_fields[name].metadata:
                if isinstance(mark, OnResume):
                    return mark
    return None
