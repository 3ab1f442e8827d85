"""The processes of a run meet before JAX is started in them: JAX ends a process that waits in vain with a C++ trace.

Process 0 listens at the coordinator's address. Each other process connects and says which run it belongs to, who it is
and what it was started with. A connection that says something else, or nothing, is turned away and changes nothing.
When all have come, or when they cannot come together, process 0 tells everybody. Messages are JSON, one a line.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from jaxllm.core.errors import UserError
from jaxllm.processes.launch import COORDINATOR, COUNT, TOKEN, Place, is_loopback
from jaxllm.processes.reception import LONGEST, Hello, Member, Reception, listen

NOTICE_S = 3.0  # after which a process that waits says for what
ANSWER_S = 30.0  # what a verdict may take beyond the time in which all were to come


class Ended(Exception):
    """Another process has said what is wrong; this one ends with `status`, without a word."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Meeting(NamedTuple):
    """All processes are there.

    links: by seat, the connections of process 0 to the others, or of another to process 0. coordinator: host:port for
    JAX's own service. listens: where process 0 serves it; None: at all addresses of its host.
    """

    me: Member
    members: tuple[Member, ...]
    links: Mapping[int, socket.socket]
    coordinator: str
    listens: str | None


def meet(place: Place, facts: Mapping[str, Any], error: str | None, timeout: float) -> Meeting:
    """Returns when all processes have come and are alike in `facts`, by name plain JSON.

    error: what is wrong with this process's input, which ends all of them. Raises UserError in process 0 if anything is
    wrong, and Ended in the others that know that it has said so; UserError in one that cannot reach process 0 within
    `timeout` seconds.
    """
    me = Member(place.process_id, os.getpid(), socket.gethostname())
    hello = Hello(me, place.num_processes, error, facts)
    return _receive(place, hello, timeout) if place.process_id == 0 else _join(place, hello, timeout)


def send(link: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends a message. Raises OSError."""
    link.sendall(json.dumps(message).encode() + b"\n")


def _receive(place: Place, own: Hello, timeout: float) -> Meeting:
    came: dict[int, tuple[socket.socket, Hello]] = {}
    twice: list[Hello] = []
    server, where = listen(place, _say)
    with closing(Reception(server, place)) as reception:
        deadline = time.monotonic() + timeout
        notice = time.monotonic() + NOTICE_S
        while len(came) < place.num_processes - 1 and not twice and (now := time.monotonic()) < deadline:
            for link, hello in reception.next(min(deadline, max(notice, now + 0.01)) - now):
                if hello.me.seat in came or hello.me.seat == 0:
                    twice = [came[hello.me.seat][1] if hello.me.seat in came else own, hello]
                    came[-1] = link, hello
                    break
                came[hello.me.seat] = link, hello
            if notice <= time.monotonic() and len(came) < place.num_processes - 1:
                notice = math.inf
                missing = _numbers({*range(1, place.num_processes)} - came.keys())
                who = f"this is process 0 of {place.num_processes}, as {place.launcher} says"
                _say(f"{who}; it waits at {where} for {missing}")
        strangers = reception.strangers
    members = (own.me, *(came[seat][1].me for seat in sorted(came)))
    coordinator = f"{place.coordinator.rpartition(':')[0]}:{_free_port(where.host)}"
    wrong = _problem(place, [own, *(came[seat][1] for seat in sorted(came))], twice, timeout, strangers)
    verdict = {"end": 2} if wrong else {"members": members, "coordinator": coordinator}
    for link, _ in came.values():
        try:
            send(link, verdict)
        except OSError:  # it will be missed
            continue
    if wrong:
        raise UserError(wrong)
    links = {seat: link for seat, (link, _) in came.items()}
    return Meeting(own.me, members, links, coordinator, where.address(coordinator))


def _join(place: Place, hello: Hello, timeout: float) -> Meeting:
    link = _connect(place, timeout)
    try:
        send(
            link,
            {"hello": hello.me, "run": place.run, "count": hello.count, "error": hello.error, "facts": hello.facts},
        )
        verdict = _read(link, timeout + ANSWER_S)
    except (OSError, ValueError) as error:
        raise UserError(
            f"process {place.process_id}: what answers at the coordinator {place.coordinator} is not process 0 of this "
            f"run, or it has ended ({error}); set {COORDINATOR} to a free port of process 0's host"
        ) from error
    if "other" in verdict:
        raise UserError(
            f"process {place.process_id}: at the coordinator {place.coordinator} another run waits for its processes; "
            f"set {COORDINATOR} to another port for one of the two runs. {TOKEN}, where it is set, must be the same in "
            "all processes of a run"
        )
    if "end" in verdict:
        raise Ended(int(verdict["end"]))
    members = tuple(Member(*member) for member in verdict["members"])
    return Meeting(hello.me, members, {0: link}, verdict["coordinator"], None)


def _say(message: str) -> None:
    print(f"{message}. For a run of one process, set {COUNT}=1", file=sys.stderr, flush=True)


def _numbers(seats: Collection[int]) -> str:
    """Such as `process 2` or `processes 1, 2, 3 and 4 more`."""
    named = ", ".join(map(str, sorted(seats)[:10])) + (f" and {len(seats) - 10} more" if len(seats) > 10 else "")
    return f"{'process' if len(seats) == 1 else 'processes'} {named}"


def _connect(place: Place, timeout: float) -> socket.socket:
    deadline, reason = time.monotonic() + timeout, "no answer"
    notice = time.monotonic() + NOTICE_S
    while (left := deadline - time.monotonic()) > 0:
        if notice <= time.monotonic():
            notice = math.inf
            _say(
                f"this is process {place.process_id} of {place.num_processes}, as {place.launcher} says; it looks for "
                f"process 0 at {place.coordinator} ({reason})"
            )
        try:
            link = socket.create_connection((place.host, place.port), timeout=min(left, 10.0))
            if link.getsockname() != link.getpeername():  # a port of this host can be connected to itself
                return link
            link.close()
        except OSError as error:
            reason = str(error.strerror or error)
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    hint = (
        "is a loopback address, which each host takes for itself"
        if is_loopback(place.host)
        else "is not process 0's host, or behind a firewall"
    )
    raise UserError(
        f"process {place.process_id} on {socket.gethostname()} has not reached the coordinator {place.coordinator} in "
        f"{timeout:g} s: {reason}. Process 0 was not started, or {place.host} {hint}; set {COORDINATOR} to the name of "
        "process 0's host as the others know it, with an open port"
    )


def _read(link: socket.socket, timeout: float) -> dict[str, Any]:
    """The next message. Raises OSError or ValueError if none comes within `timeout` seconds."""
    deadline, data = time.monotonic() + timeout, b""
    while not data.endswith(b"\n"):
        link.settimeout(max(0.01, deadline - time.monotonic()))
        part = link.recv(1 << 16)
        if not part or len(data) > LONGEST:
            raise ValueError("the connection was closed")
        data += part
    return json.loads(data)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return probe.getsockname()[1]


def _problem(
    place: Place, hellos: Sequence[Hello], twice: Sequence[Hello], timeout: float, strangers: int
) -> str | None:
    """Why these processes are not one run; None if they are. Process 0 comes first."""
    own, *others = hellos
    if twice:
        return (
            f"{twice[0].me} and {twice[1].me} have the same number; give each process its own, from 0 to "
            f"{place.num_processes - 1}"
        )
    if own.error is not None:
        return own.error
    for other in others:
        if other.error is not None:
            return f"{other.me}: {other.error}"
        if other.count != own.count:
            return (
                f"{own.me} was started as one of {own.count}, and {other.me} as one of {other.count}; start them alike"
            )
    if missing := sorted({*range(place.num_processes)} - {hello.me.seat for hello in hellos}):
        turned_away = (
            f" {strangers} connections of other programs or other runs were turned away; {TOKEN} must be the same text "
            "in all processes of a run."
            if strangers
            else ""
        )
        return (
            f"{_numbers(missing)} of {place.num_processes} {'has' if len(missing) == 1 else 'have'} not come to "
            f"{place.coordinator} in {timeout:g} s; look whether they were started, and whether their hosts reach this "
            f"one.{turned_away} distributed.start_timeout is how long they may take; {COUNT}=1 makes this process a "
            "run of its own"
        )
    for other in others:
        for name in (*own.facts, *other.facts):
            here, there = own.facts.get(name), other.facts.get(name)
            if here != there:
                return (
                    f"the processes disagree: {name} is {_short(here)} in {own.me} and {_short(there)} in {other.me}; "
                    "start all of them with the same config, arguments and versions"
                )
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"
