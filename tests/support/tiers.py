"""Which tests run when: the plain tier, `full` before landing, and `tables` by hand before a release."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def representatives(every: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """The values or `pytest.param`s of `every`: those of `chosen`, by value or id, are in the tier of their test, and
    the others in the tables.

    Raises ValueError for one of `chosen` that is not there.
    """
    left = set(map(str, chosen))
    found = []
    for one in every:
        name = str(getattr(one, "id", None) or one)
        if name in left:
            left.remove(name)
            found.append(one)
        elif hasattr(one, "values"):
            found.append(pytest.param(*one.values, id=one.id, marks=[*one.marks, pytest.mark.tables]))
        else:
            found.append(pytest.param(one, marks=pytest.mark.tables))
    if left:
        raise ValueError(f"not among the values: {sorted(left)}")
    return found
