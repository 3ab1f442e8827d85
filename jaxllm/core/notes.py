"""What is to be said beside a result, and is no error."""

import sys

import jax


def note(text: str) -> None:
    """Prints `note: text` on the standard error; of several processes, process 0 does."""
    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)
