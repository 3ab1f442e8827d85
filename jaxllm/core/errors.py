"""The one exception that means "the user's input is wrong"."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input from the user: the message names the thing, its value and the remedy.

    Commands print the message without a traceback and exit with status 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or `""` when none is close."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`; of equally close ones, one with the same first letter. None: none is close.

    cutoff: the share of letters in common, from 0 to 1, from which a name is close.
    """

    def closeness(other: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, other, name).ratio(), other[:1] == name[:1]

    close = difflib.get_close_matches(name, list(known), n=5, cutoff=cutoff)
    return max(close, key=closeness, default=None)
