"""How a command ends."""

import sys
from collections.abc import Callable

from jaxllm.core.errors import UserError


def exit_status(command: Callable[[], int | None], interrupted: str = "") -> int:
    """Runs `command`; returns its exit status, or 0 for None.

    Wrong input becomes one message and 2, Ctrl-C the text `interrupted` and 130; whatever else is raised is our fault,
    and goes on.
    """
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
