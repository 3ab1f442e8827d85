"""`python -m jaxllm.doctor [CONFIG.yaml [section.key=value …]]`: what the processes of a run see, before it starts."""

import argparse
import os
import sys
from contextlib import nullcontext

from jaxllm.core.command import exit_status
from jaxllm.core.errors import UserError
from jaxllm.processes.environment import GPU_MEMORY_SHARE, prepare_backends, without_torch
from jaxllm.processes.launch import find_place

DESCRIPTION = """Says what each process sees: its host, devices, driver, free memory and disk; the versions, the
coordinator, and the mesh of CONFIG.yaml if one is given. Then all devices add up a number together, and the time that
takes is said. Start it as you would start the run: alone, by srun or mpirun, in a Job of Kubernetes, or by
scripts/launch."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.doctor",
        usage="%(prog)s [CONFIG.yaml [section.key=value ...]]",
        description=DESCRIPTION,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="a config of jaxllm.train")
    parser.add_argument(
        "changes", nargs="*", metavar="section.key=value", help="changes a value of it, as in jaxllm.train"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 all is well; 2 something is wrong, and the message says what; 1 a
    process died or a device failed; 130 interrupted."""
    return exit_status(lambda: _examine(_parser().parse_args(arguments)))


def _examine(options: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxllm.core.config import load
    from jaxllm.doctor.examine import examine
    from jaxllm.processes.distributed import joined
    from jaxllm.processes.rendezvous import Ended
    from jaxllm.processes.watch import DistributedConfig
    from jaxllm.runs.config import Config
    from jaxllm.runs.config_changes import values_of

    place, config, wrong = find_place(), None, None
    try:
        config = load(options.config, options.changes, Config) if options.config else None
    except UserError as error:
        if place is None:
            raise
        wrong = error  # process 0 says it for all
    waits = config.distributed if config else DistributedConfig()
    together = joined(place, values_of(config) if config else {}, waits, wrong) if place else nullcontext()
    try:
        with together:
            examine(config, place, Console(quiet=place is not None and place.process_id != 0))
    except Ended as ended:
        return ended.status
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    without_torch()
    prepare_backends()
    sys.exit(main(sys.argv[1:]))
