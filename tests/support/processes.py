"""Runs of several processes on this machine, each with simulated devices of its own."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PATIENCE_S = 240  # for the slowest of machines; nothing here takes a tenth of it


class Ended(NamedTuple):
    """A process that has ended. said, complained: its standard output and error."""

    status: int
    said: str
    complained: str


def free_address() -> str:
    """host:port below the ports that the system gives to connections."""
    return f"127.0.0.1:{random.randrange(20000, 32000)}"


def environment(devices: int = 2, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **variables,
    }


@contextmanager
def together(
    commands: Sequence[Sequence[str]], *, devices: int = 2, cwd: Path | None = None, **variables: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process of a run for each of `commands` (arguments of Python); none outlives the block."""
    address = free_address()
    running = [
        subprocess.Popen(
            [sys.executable, "-u", *command],
            env=environment(devices, **variables)
            | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands)), "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        for i, command in enumerate(commands)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def ends(running: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """How the processes end, by themselves."""
    outputs = [process.communicate(timeout=PATIENCE_S) for process in running]
    return [Ended(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
