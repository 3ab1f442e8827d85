"""`python -m jaxllm.train CONFIG.yaml [section.key=value …]`."""

import os
import sys

from jaxllm.core.command import exit_status
from jaxllm.core.compilation_cache import keep_programs
from jaxllm.processes.environment import GPU_MEMORY_SHARE, prepare_backends, without_torch
from jaxllm.processes.launch import find_place

USAGE = """usage: python -m jaxllm.train CONFIG.yaml [section.key=value ...]

Trains a language model as CONFIG.yaml says; section.key=value changes a value of it. Examples are in configs/.
Of a run of several processes, each is started with the same arguments, by srun, by mpirun, by a Job of Kubernetes or by
scripts/launch, as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; python -m jaxllm.doctor tests it.
Every key, its default and its meaning ([x]: of the type x alone):
"""


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 done, 2 wrong input, 128 + signal when interrupted."""
    asks_help = not arguments or arguments[0] in ("-h", "--help")
    command = _help if asks_help else _train
    return exit_status(lambda: command(arguments), interrupted="interrupted before the run began")


def _help(arguments: list[str]) -> int:
    from jaxllm.core.config.reference import reference
    from jaxllm.runs.config import Config

    print(USAGE + reference(Config), file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2


def _train(arguments: list[str]) -> int:
    from rich.console import Console

    from jaxllm.core.config import load
    from jaxllm.processes.interrupt import Interrupt
    from jaxllm.runs.config import Config
    from jaxllm.train.run import run

    if (place := find_place()) is not None:
        from jaxllm.train.multiprocess import train_together

        return train_together(place, arguments)
    console = Console()
    with Interrupt(console) as interrupt:
        return run(load(arguments[0], arguments[1:], Config), console, interrupt=interrupt)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    without_torch()
    prepare_backends()
    keep_programs()
    sys.exit(main(sys.argv[1:]))
