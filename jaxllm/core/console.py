"""What a command says to people: lines on the console, and notes on the standard error."""

import sys
from collections.abc import Callable

import jax
from rich.console import Console
from rich.text import Text

Say = Callable[[str, object], None]
"""Prints a line for people: what it is about, and what there is to say."""


def saying(console: Console) -> Say:
    """What prints lines on `console`."""

    def say(what: str, value: object) -> None:
        shown = value if isinstance(value, Text) else str(value)
        console.print(Text.assemble(f"{what:<10}", shown), soft_wrap=True)

    return say


def note(text: str) -> None:
    """Prints `note: text` on the standard error; of several processes, process 0 does."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:  # asking for the index starts the devices
        print(f"note: {text}", file=sys.stderr)
