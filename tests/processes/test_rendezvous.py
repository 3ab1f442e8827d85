"""Processes that meet, here on threads: either all are alike and go on, or all end and process 0 says why."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxllm.core.errors import UserError
from jaxllm.processes import reception, rendezvous
from jaxllm.processes.launch import Place
from jaxllm.processes.reception import listen
from jaxllm.processes.rendezvous import Ended, Meeting, meet
from tests.support.processes import free_address


def outcome(place: Place, facts: dict[str, Any], error: str | None, timeout: float) -> Meeting | UserError | Ended:
    try:
        return meet(place, facts, error, timeout)
    except (UserError, Ended) as ended:
        return ended


def meeting(
    *facts: dict[str, Any],
    errors: dict[int, str] | None = None,
    seats: tuple[int, ...] | None = None,
    counts: dict[int, int] | None = None,
    timeout: float = 30,
) -> list[Meeting | UserError | Ended]:
    """What each process is told, in the order of their seats. counts: of how many a process believes that it is one."""
    address = free_address()
    places = [
        Place(seat, (counts or {}).get(i, len(facts)), address)
        for i, seat in enumerate(seats or tuple(range(len(facts))))
    ]
    with ThreadPoolExecutor(len(facts)) as pool:
        told = [
            pool.submit(outcome, place, fact, (errors or {}).get(i), timeout)
            for i, (place, fact) in enumerate(zip(places, facts, strict=True))
        ]
        return [future.result(timeout=60) for future in told]


def assert_ended(told: list[Meeting | UserError | Ended], message: str) -> None:
    """Process 0 has the message, the others end with status 2 and none."""
    first, *others = told
    assert isinstance(first, UserError)
    assert message in str(first)
    assert [getattr(other, "status", other) for other in others] == [2] * len(others)


def test_all_alike_go_on():
    told = meeting(*[{"train.steps": 3, "jax": "1"}] * 4)
    for seat, met in enumerate(told):
        assert isinstance(met, Meeting)
        assert met.me.seat == seat
        assert [member.seat for member in met.members] == [0, 1, 2, 3]
        assert met.coordinator == told[0].coordinator  # pyright: ignore
        assert set(met.links) == ({1, 2, 3} if seat == 0 else {0})
        for link in met.links.values():
            link.close()


def test_the_key_that_differs_is_named():
    told = meeting({"seed": 0, "train.steps": 3}, {"seed": 0, "train.steps": 3}, {"seed": 0, "train.steps": 4})
    assert_ended(told, "the processes disagree: train.steps is 3 in process 0 (pid ")
    assert " and 4 in process 2 (pid " in str(told[0])
    assert_ended(meeting({"seed": 0}, {"seed": 0, "evals.0.every": 5}), "evals.0.every is null in process 0")
    assert_ended(meeting({"jax": "0.10.2"}, {"jax": "0.10.3"}), 'jax is "0.10.2" in process 0')


def test_wrong_input_is_said_once():
    assert_ended(meeting({}, {}, errors={0: "no such key", 1: "no such key"}), "no such key")
    told = meeting({}, {}, {}, errors={2: "no such file"})
    assert_ended(told, "process 2 (pid ")
    assert ": no such file" in str(told[0])


def test_processes_that_were_started_wrongly():
    assert_ended(meeting({}, {}, {}, seats=(0, 1, 1)), "have the same number; give each process its own, from 0 to 2")
    assert_ended(meeting({}, {}, counts={1: 4}), "process 0 (pid ")


def test_a_process_that_does_not_come():
    told = meeting({}, {}, counts={0: 3, 1: 3}, timeout=1)
    assert_ended(told, "process 2 of 3 has not come to 127.0.0.1:")


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_coordinator_that_is_not_there(host):
    address = f"{host}:{free_address().rpartition(':')[2]}"
    begun = time.monotonic()
    with pytest.raises(UserError) as refused:
        meet(Place(1, 2, address), {}, None, timeout=1)
    assert time.monotonic() - begun < 20
    assert f"process 1 on {socket.gethostname()} has not reached the coordinator {address} in 1 s" in str(refused.value)
    assert ("loopback address" in str(refused.value)) == (host == "127.0.0.1")


def test_a_port_that_another_program_has():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"process 0 cannot listen at port {port} .* another program uses it"):
            meet(Place(0, 2, f"127.0.0.1:{port}"), {}, None, timeout=1)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(outcome, Place(1, 2, f"127.0.0.1:{port}"), {}, None, 30)
            other.accept()[0].close()
            told = asking.result(timeout=60)
    assert "is not process 0 of this run" in str(told)


HELLO = {"hello": [1, 7, "elsewhere"], "run": "job 1", "count": 2, "error": None, "facts": {}}
STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"",
    b"\x16\x03\x01\x02\x00\x01\n",
    b"[" * 100_000 + b"\n",
    b"[]\n",
    b'{"hello": 1}\n',
    *(
        json.dumps({**HELLO, **wrong}).encode() + b"\n"
        for wrong in (
            {"run": "job 2"},
            {"run": None},
            {"run": ""},
            {"hello": ["1", 7, "elsewhere"]},
            {"hello": [-1, 7, "elsewhere"]},
            {"hello": [True, 7, "elsewhere"]},
            {"count": None},
            {"facts": []},
            {"error": {}},
        )
    ),
    json.dumps({**HELLO, "run": "job 2", "error": "stop"}).encode() + b"\n",
]


def test_256_processes_meet_among_50_strangers_who_say_nothing_or_nonsense():
    count, address = 256, free_address()
    port = int(address.rpartition(":")[2])
    strangers: list[socket.socket] = []
    with ThreadPoolExecutor(count) as pool:
        first = pool.submit(outcome, Place(0, count, address, run="job 1"), {"seed": 0}, None, 120)
        for i in range(50):
            strangers.append(connected(port))
            strangers[-1].sendall(STRANGERS[i % len(STRANGERS)])
        begun = time.monotonic()
        others = [
            pool.submit(outcome, Place(seat, count, address, run="job 1"), {"seed": 0}, None, 120)
            for seat in range(1, count)
        ]
        told = [future.result(timeout=120) for future in (first, *others)]
    # Strangers are heard for 10 s each; side by side they cost nothing.
    assert time.monotonic() - begun < 60
    assert [type(met) for met in told] == [Meeting] * count
    assert [met.me.seat for met in told if isinstance(met, Meeting)] == list(range(count))
    for met in told:
        if isinstance(met, Meeting):
            for link in met.links.values():
                link.close()
    for stranger in strangers:
        stranger.close()


def connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.02)


def test_two_runs_on_one_port_are_told_apart():
    address = free_address()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(outcome, Place(0, 2, address, run="job 1"), {}, None, 30)
        foreign = pool.submit(outcome, Place(1, 2, address, run="job 2"), {}, None, 30).result(timeout=60)
        own = pool.submit(outcome, Place(1, 2, address, run="job 1"), {}, None, 30)
        told = [future.result(timeout=60) for future in (first, own)]
    assert "another run waits for its processes; set JAX_COORDINATOR_ADDRESS to another port" in str(foreign)
    assert [type(met) for met in told] == [Meeting, Meeting]


def test_what_was_turned_away_is_said_when_a_process_does_not_come():
    address = free_address()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(outcome, Place(0, 2, address, run="job 1"), {}, None, 2)
        pool.submit(outcome, Place(1, 2, address, run="job 2"), {}, None, 30).result(timeout=60)
        assert " 1 connections of other programs or other runs were turned away" in str(first.result(timeout=60))


def test_process_0_listens_at_the_address_of_the_coordinator_alone():
    place = Place(0, 2, free_address())
    server, where = listen(place, lambda _: None)
    with server:
        assert server.getsockname() == ("127.0.0.1", place.port)
        assert where.address("127.0.0.1:77") == "127.0.0.1:77"
        with pytest.raises(UserError, match="another program uses it"):
            listen(place, lambda _: None)


@pytest.mark.parametrize("means", ["127.0.1.1", "192.0.2.1"])  # as Debian's /etc/hosts says; the outside of a router
def test_a_name_that_means_no_address_of_this_host_for_others(means, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", (means, 0))])
    said: list[str] = []
    server, where = listen(Place(0, 2, f"node7:{free_address().rpartition(':')[2]}"), said.append)
    server.close()
    assert (where.host, where.address("node7:77")) == ("", None)
    assert "process 0 listens at all of its addresses" in said[0]


def test_who_waits_says_within_seconds_for_what(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.2)
    address = free_address()
    outcome(Place(0, 4, address, "Slurm"), {}, None, 0.5)
    outcome(Place(2, 4, address, "Slurm"), {}, None, 0.5)
    zero, two = capsys.readouterr().err.splitlines()
    assert zero.startswith(f"this is process 0 of 4, as Slurm says; it waits at {address} for processes 1, 2, 3.")
    assert two.startswith(f"this is process 2 of 4, as Slurm says; it looks for process 0 at {address}")
    for line in (zero, two):
        assert line.endswith("For a run of one process, set JAX_NUM_PROCESSES=1")


def test_a_crowd_of_silent_connections_is_bounded():
    address = free_address()
    port = int(address.rpartition(":")[2])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(outcome, Place(0, 2, address, run="job 1"), {}, None, 60)
        crowd = [connected(port) for _ in range(reception.STRANGERS + 20)]
        own = pool.submit(outcome, Place(1, 2, address, run="job 1"), {}, None, 60)
        told = [future.result(timeout=60) for future in (first, own)]
    for link in crowd:
        link.close()
    assert [type(met) for met in told] == [Meeting, Meeting]
