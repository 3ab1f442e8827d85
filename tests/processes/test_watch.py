"""Processes that watch one another, without JAX: when one fails, dies or hangs, it is named and all end."""

import signal
import time

import pytest

from tests.support.processes import Ended, ends, together

# Each process gets on until it is told otherwise: `<what> <seat>` is what the process of that seat does after a while.
PROGRAM = """
import signal, sys, time
from jaxllm.processes.launch import find_place
from jaxllm.processes.rendezvous import meet
from jaxllm.processes.watch import DistributedConfig, Watch
what, seat = sys.argv[1], int(sys.argv[2])
meeting = meet(find_place(), {}, None, 60)
watch = Watch(meeting, DistributedConfig(dead_after=3.0, hang_after=2.0 if "hang" in what else 600.0))
watch.tick()
print("together", flush=True)

def where_it_hangs():
    time.sleep(600)

own = meeting.me.seat == seat
for step in range(10 if what == "ends" else 6000):
    time.sleep(0.1)
    if what == "fails" and own and step == 5:
        watch.fail(2, "no such file")
    if what == "fails-everywhere" and step == 5:
        watch.fail(2, "no such file")
    if what == "crashes" and own and step == 5:
        watch.crashed(ZeroDivisionError("a bug"))
    if what == "interrupted" and own and step == 5:
        watch.interrupted(15, "go on from the checkpoint")
    if what == "hangs" and own and step == 5:
        where_it_hangs()
    if what == "all-hang" and step == 5:
        time.sleep(600)
    watch.tick()
watch.close()
print("left", flush=True)
"""


def run(what: str, seat: int = 1, *, count: int = 3, number: signal.Signals | None = None) -> list[Ended]:
    """How each of `count` processes ends. number: a signal that the one in `seat` gets when all are there."""
    with together([["-c", PROGRAM, what, str(seat)]] * count) as running:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "together\n"
        if number is not None:
            time.sleep(0.5)
            running[seat].send_signal(number)
            if number == signal.SIGSTOP:
                return ends([process for i, process in enumerate(running) if i != seat])
        return ends(running)


def complaints(ended: list[Ended]) -> list[str]:
    return [process.complained.strip() for process in ended]


def test_all_take_leave():
    assert [(process.status, process.said, process.complained) for process in run("ends")] == [(0, "left\n", "")] * 3


def test_wrong_input_ends_all_with_one_message():
    for seat, said in ((0, "error: no such file"), (2, "error: process 2 (pid ")):
        ended = run("fails", seat)
        assert [process.status for process in ended] == [2, 2, 2]
        assert complaints(ended)[0].startswith(said)
        assert complaints(ended)[1:] == ["", ""]
    ended = run("fails-everywhere")
    assert [process.status for process in ended] == [2, 2, 2]
    assert complaints(ended) == ["error: no such file", "", ""]


def test_an_error_that_nobody_expected_keeps_its_traceback():
    ended = run("crashes")
    assert [process.status for process in ended] == [1, 1, 1]
    assert "failed, and so the run ends: ZeroDivisionError: a bug" in complaints(ended)[0]
    assert "ZeroDivisionError: a bug" in complaints(ended)[1]
    assert complaints(ended)[2] == ""


def test_a_process_that_is_interrupted_at_once_takes_the_others_with_it():
    ended = run("interrupted")
    assert [process.status for process in ended] == [128 + 15] * 3
    assert "was ended by SIGTERM: go on from the checkpoint" in complaints(ended)[0]


@pytest.mark.parametrize("seat", [0, 1])
def test_a_killed_process_is_named_at_once(seat):
    begun = time.monotonic()
    ended = run("runs", seat, number=signal.SIGKILL)
    assert time.monotonic() - begun < 30
    assert [process.status for process in ended] == [-9 if i == seat else 1 for i in range(3)]
    assert f"process {seat} (pid " in complaints(ended)[1 - seat]
    assert "has died, and so the run ends; the same command goes on" in complaints(ended)[1 - seat]


def test_a_process_that_falls_silent_is_named():
    first, third = run("runs", 1, number=signal.SIGSTOP)
    assert (first.status, third.status) == (1, 1)
    assert "process 1 (pid " in first.complained
    assert "has not been heard of for 3 s, and so the run ends" in first.complained
    assert third.complained == ""


def test_a_process_that_hangs_is_named_and_says_where_it_stands():
    ended = run("hangs", 2)
    assert [process.status for process in ended] == [1, 1, 1]
    named, other, hanging = complaints(ended)
    assert named.startswith("process 2 (pid ")
    assert "has not got on in 2 s (distributed.hang_after), and the others wait for it" in named
    assert "in where_it_hangs" in hanging
    assert other == ""


def test_when_all_hang_none_is_accused():
    ended = run("all-hang", count=2)
    assert [process.status for process in ended] == [1, 1]
    assert complaints(ended)[0].startswith("no process has got on in 2 s")
