"""How a command ends."""

import os
import sys
from collections.abc import Callable

from jaxllm.core.errors import UserError, explained

BROKEN_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ended


def exit_status(command: Callable[[], int | None], interrupted: str = "") -> int:
    """Runs `command`; returns its exit status, or 0 for None.

    Wrong input, and a file, disk or memory that cannot be used, becomes one message and 2. Ctrl-C becomes the text
    `interrupted` and 130. A reader of the output that has left, such as `head`, ends the command quietly. Any other
    exception is a fault of ours and passes through.
    """
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # Python flushes the standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, MemoryError) as error:
        if (explanation := explained(error)) is None:
            raise
        message = explanation
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2
