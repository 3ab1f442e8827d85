"""The one exception that means "the user's input is wrong"."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input from the user: the message names the thing, its value and the remedy.

    Commands print the message without a traceback and exit with status 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
