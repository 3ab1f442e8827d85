"""Ctrl-C and SIGTERM, also while the main thread is busy outside of Python."""

import signal
import subprocess
import sys
import time

import pytest

# A long computation in C, as a compilation is: Python's own signal handlers wait for its end.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 400_000_000)"
PROGRAM = f"""
import sys
from contextlib import nullcontext
from rich.console import Console
from jaxllm.processes.interrupt import Interrupt
with Interrupt(Console()) as interrupt:
    with interrupt.graceful() if sys.argv[1] == "graceful" else nullcontext():
        print("ready", flush=True)
        {BUSY}
"""


def start(how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_of_training_a_signal_ends_the_process_at_once(number):
    process = start("at once")
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "interrupted; the same command goes on" in said


def test_in_training_the_first_signal_is_noted_and_the_second_ends_the_process():
    process = start("graceful")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("SIGTERM: the run ends after this step and saves it")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
