"""The bounds that every number and text of a config has, whether or not its field names one."""

from typing import Annotated, Any

from pydantic import Field

WHOLE_NUMBERS = 2**31 - 1  # steps, sizes and counts reach JAX as 32-bit integers
NUMBERS = float(2**127)  # rates and factors reach JAX as float32, whose largest number is just below 2**128
INTEGERS = 2**63 - 1  # what the libraries below a config hold, where a setting is not bound to 32 bits

Integer = Annotated[int, Field(ge=-INTEGERS, le=INTEGERS)]
"""A whole number that is handed on as it is: to a template, or to XLA."""
PositiveOrInfinite = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""A limit; infinity is none."""


def bound(node: Any) -> None:
    """Gives every `int` and `float` of a pydantic core schema a lower and an upper bound, where its field sets none.

    Infinity and NaN are refused, unless the field says `allow_inf_nan=True`.
    """
    if isinstance(node, list):
        for item in node:
            bound(item)
    elif isinstance(node, dict):
        kind = node.get("type")  # a section's fields are a dict too, and one of them may be called type
        if kind in ("int", "float"):
            limit = WHOLE_NUMBERS if kind == "int" else NUMBERS
            if "le" not in node and "lt" not in node and not node.get("allow_inf_nan"):
                node["le"] = limit
            if "ge" not in node and "gt" not in node:
                node["ge"] = -limit
            if kind == "float":
                node.setdefault("allow_inf_nan", False)
        for key, value in node.items():
            if key not in ("default", "metadata", "serialization"):
                bound(value)


def at_most(limit: float) -> str:
    """How a message names an upper bound, with the reason for a bound of this page."""
    why = {WHOLE_NUMBERS: ", which 32 bits hold", NUMBERS: ", which float32 holds"}.get(limit, "")
    return f"at most {limit:.6g}{why}" if isinstance(limit, float) else f"at most {limit}{why}"


def text_fault(text: str) -> str | None:
    """What keeps `text` from being a file name or a text: NUL, or half of a surrogate pair. None if nothing does."""
    if "\0" in text:
        return "has the character NUL, which neither file names nor texts may hold; remove it."
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has {text[error.start]!r}, half of a surrogate pair, which is no character; remove it."
    return None
