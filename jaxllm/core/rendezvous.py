"""The processes of a run meet before JAX is started in them: JAX ends a process that waits in vain with a C++ trace.

Process 0 listens at the coordinator's address; each other one says who it is and what it was started with. When all
have come, or when they cannot come together, process 0 tells everybody. Messages are JSON, one a line.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.core.errors import UserError
from jaxllm.core.launch import COORDINATOR, Place, is_loopback

LONGEST = 1 << 22  # bytes in a message
ANSWER_S = 30.0  # what a verdict may take beyond the time in which all were to come


class Member(NamedTuple):
    """A process of the run. seat: its number."""

    seat: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.seat} (pid {self.pid} on {self.host})"


class Ended(Exception):
    """Another process has said what is wrong; this one ends with `status`, without a word."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Meeting(NamedTuple):
    """All processes are there.

    links: by seat, the connections of process 0 to the others, or of another to process 0. coordinator: host:port for
    JAX's own service.
    """

    me: Member
    members: tuple[Member, ...]
    links: Mapping[int, socket.socket]
    coordinator: str


class _Hello(NamedTuple):
    """What a process says of itself. error: what is wrong with its input. facts: what must be alike everywhere."""

    me: Member
    count: int
    error: str | None
    facts: Mapping[str, Any]


def meet(place: Place, facts: Mapping[str, Any], error: str | None, timeout: float) -> Meeting:
    """Returns when all processes have come and are alike in `facts`, by name plain JSON.

    error: what is wrong with this process's input, which ends all of them. Raises UserError in process 0 if anything is
    wrong, and Ended in the others that know that it has said so; UserError in one that cannot reach process 0 within
    `timeout` seconds.
    """
    me = Member(place.process_id, os.getpid(), socket.gethostname())
    hello = _Hello(me, place.num_processes, error, facts)
    return _receive(place, hello, timeout) if place.process_id == 0 else _join(place, hello, timeout)


def send(link: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends a message. Raises OSError."""
    link.sendall(json.dumps(message).encode() + b"\n")


def _receive(place: Place, own: _Hello, timeout: float) -> Meeting:
    came: dict[int, tuple[socket.socket, _Hello]] = {}
    twice: list[_Hello] = []
    deadline = time.monotonic() + timeout
    with _listen(place) as server:
        while len(came) < place.num_processes - 1 and not twice and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                link, _ = server.accept()
            except TimeoutError:
                break
            if (hello := _hello(link)) is None:  # somebody else's
                link.close()
            elif hello.me.seat in came or hello.me.seat == 0:
                twice = [came[hello.me.seat][1] if hello.me.seat in came else own, hello]
                came[-1] = link, hello
            else:
                came[hello.me.seat] = link, hello
    members = (own.me, *(came[seat][1].me for seat in sorted(came)))
    coordinator = f"{place.coordinator.rpartition(':')[0]}:{_free_port()}"
    wrong = _problem(place, [own, *(came[seat][1] for seat in sorted(came))], twice, timeout)
    verdict = {"end": 2} if wrong else {"members": members, "coordinator": coordinator}
    for link, _ in came.values():
        try:
            send(link, verdict)
        except OSError:  # it will be missed
            continue
    if wrong:
        raise UserError(wrong)
    return Meeting(own.me, members, {seat: link for seat, (link, _) in came.items()}, coordinator)


def _join(place: Place, hello: _Hello, timeout: float) -> Meeting:
    link = _connect(place, timeout)
    try:
        send(link, {"hello": hello.me, "count": hello.count, "error": hello.error, "facts": hello.facts})
        verdict = _read(link, timeout + ANSWER_S)
    except (OSError, ValueError) as error:
        raise UserError(
            f"process {place.process_id}: what answers at the coordinator {place.coordinator} is not process 0 of this "
            f"run, or it has ended ({error}); set {COORDINATOR} to a free port of process 0's host"
        ) from error
    if "end" in verdict:
        raise Ended(int(verdict["end"]))
    members = tuple(Member(*member) for member in verdict["members"])
    return Meeting(hello.me, members, {0: link}, verdict["coordinator"])


def _listen(place: Place) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.port))
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise UserError(
            f"process 0 cannot listen at port {place.port} of {socket.gethostname()}, as the coordinator "
            f"{place.coordinator} says: {'another program uses it' if in_use else error.strerror}; set {COORDINATOR} "
            "to another port in all processes"
        ) from error


def _connect(place: Place, timeout: float) -> socket.socket:
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = socket.create_connection((place.host, place.port), timeout=left)
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


def _hello(link: socket.socket) -> _Hello | None:
    try:
        said = _read(link, 10)
        return _Hello(Member(*said["hello"]), said["count"], said["error"], said["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def _problem(place: Place, hellos: Sequence[_Hello], twice: Sequence[_Hello], timeout: float) -> str | None:
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
        named = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        return (
            f"of {place.num_processes} processes number {named} {'has' if len(missing) == 1 else 'have'} not come to "
            f"{place.coordinator} in {timeout:g} s; look whether they were started, and whether their hosts reach this "
            "one. distributed.start_timeout is how long they may take"
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
