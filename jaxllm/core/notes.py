"""What is to be said beside a result, and is no error."""

import sys

from jaxllm.core.distributed import is_first


def note(text: str) -> None:
    """Prints `note: text` on the standard error; of several processes, process 0 does."""
    if is_first():
        print(f"note: {text}", file=sys.stderr)
