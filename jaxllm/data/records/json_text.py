"""JSON of records. What Python's `json` reads without a word, or not without a traceback, is refused here."""

import json
from typing import Any


class JsonError(ValueError):
    """Text that is no JSON, or not to be read as a record. `at`: the character that is wrong, None for the whole."""

    def __init__(self, what: str, at: int | None = None) -> None:
        super().__init__(what if at is None else f"{what} at character {at + 1}")
        self.what = what
        self.at = at


def parse_json(text: str) -> Any:
    """The one value that `text` holds. Raises JsonError."""
    value, end = parse_json_at(text, len(text) - len(text.lstrip()))
    if rest := text[end:].lstrip():
        raise JsonError("Extra data", len(text) - len(rest))
    return value


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at the character `start` of `text`, and where it ends. Raises JsonError."""
    try:
        return _decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, error.pos) from None
    except RecursionError:
        raise JsonError("its lists or objects are nested too deeply") from None
    except JsonError:
        raise
    except ValueError:  # Python's limit for numbers, of which long ones take quadratic time
        raise JsonError("a whole number has thousands of digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"the key {twice!r} is given twice in one object; keep one of them")
    return value


_decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
