"""`python -m jaxllm.prepare CONFIG.yaml [section.key=value …]`: tokenizes the data of a run ahead of it."""

import os
import sys

from jaxllm.core.command import exit_status
from jaxllm.processes.environment import without_idle_cuda, without_torch

USAGE = """usage: python -m jaxllm.prepare CONFIG.yaml [section.key=value ...]

Tokenizes the data of a training run, its held-out sets too, into the cache ($JAXLLM_CACHE, or ~/.cache/jaxllm), and
says what `python -m jaxllm.train` with the same arguments would say of it. Needs no GPU and writes nothing else.
The keys are those of `python -m jaxllm.train --help`.
"""


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 done, 2 wrong input, 130 interrupted."""
    asks_help = not arguments or arguments[0] in ("-h", "--help")
    command = _help if asks_help else _prepare
    return exit_status(lambda: command(arguments), interrupted="interrupted; nothing of what was tokenized is kept")


def _help(arguments: list[str]) -> int:
    print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2


def _prepare(arguments: list[str]) -> None:
    from rich.console import Console

    from jaxllm.core.config import load
    from jaxllm.core.console import saying
    from jaxllm.runs.config import Config
    from jaxllm.train.inputs import read_inputs
    from jaxllm.train.model import open_tokenizer

    config = load(arguments[0], arguments[1:], Config)
    say = saying(Console())
    inputs = read_inputs(config, open_tokenizer(config.model), say)
    stores = dict.fromkeys(rows.store.folder for rows in (inputs.train, *inputs.held_out.values()))
    say("prepared", ", ".join(map(str, stores)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    without_torch()
    without_idle_cuda()
    sys.exit(main(sys.argv[1:]))
