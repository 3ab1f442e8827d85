"""`python -m jaxllm.train CONFIG.yaml [section.key=value …]`."""

import os
import sys

USAGE = """usage: python -m jaxllm.train CONFIG.yaml [section.key=value ...]

Trains a language model as CONFIG.yaml says; section.key=value changes a value of it.
Example configs are in configs/, every key is described in the README.
"""


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 done, 2 wrong input, 128 + signal when interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2

    # Imported after the help, which should be instant.
    from rich.console import Console

    from jaxllm.core.config import load
    from jaxllm.core.errors import UserError
    from jaxllm.train.config import Config
    from jaxllm.train.run import run

    try:
        return run(load(arguments[0], arguments[1:], Config), Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing was trained", file=sys.stderr)
        return 130


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main(sys.argv[1:]))
