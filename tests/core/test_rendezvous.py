"""Processes that meet, here on threads: either all are alike and go on, or all end and process 0 says why."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from processes import free_address

from jaxllm.core.errors import UserError
from jaxllm.core.launch import Place
from jaxllm.core.rendezvous import Ended, Meeting, meet


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
    assert_ended(told, "of 3 processes number 2 has not come to 127.0.0.1:")


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


def test_strangers_at_the_port_are_ignored():
    address = free_address()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(outcome, Place(0, 2, address), {}, None, 30)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"hello": 1}\n', b""):
            while True:
                try:
                    stranger = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
                    break
                except OSError:
                    time.sleep(0.05)
            with stranger:
                stranger.sendall(said)
        second = pool.submit(outcome, Place(1, 2, address), {}, None, 30)
        told = [future.result(timeout=60) for future in (first, second)]
    assert [type(met) for met in told] == [Meeting, Meeting]
