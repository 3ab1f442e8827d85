"""Process 0's door: it reads what those who connect say of themselves, and lets in the processes of its own run."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, cast

from jaxllm.core.errors import UserError
from jaxllm.processes.launch import COORDINATOR, Place, is_loopback

LONGEST = 1 << 22  # bytes in a message
HELLO_S = 10.0  # in which one who connects says who it is
STRANGERS = 256  # connections from outside the run that may wait at the same time
BACKLOG = 1024  # connections that the system keeps before they are read


class Member(NamedTuple):
    """A process of the run. seat: its number."""

    seat: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.seat} (pid {self.pid} on {self.host})"


class Hello(NamedTuple):
    """What a process says of itself. error: what is wrong with its input. facts: what must be alike everywhere."""

    me: Member
    count: int
    error: str | None
    facts: Mapping[str, Any]


class Reception:
    """Reads what those who connect say of themselves, side by side: nobody who is silent holds the others up."""

    def __init__(self, server: socket.socket, place: Place) -> None:
        self.strangers = 0
        """connections that were turned away"""
        self._place = place
        self._server = server
        self._waiting: dict[socket.socket, tuple[bytearray, float]] = {}
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def close(self) -> None:
        """Closes the door, and the connections of those who have said nothing."""
        for link in list(self._waiting):
            self._turn_away(link)
        self._selector.close()
        self._server.close()

    def next(self, timeout: float) -> list[tuple[socket.socket, Hello]]:
        """Those of this run who have said who they are, after at most `timeout` seconds."""
        ends = [deadline for _, deadline in self._waiting.values()]
        told: list[tuple[socket.socket, Hello]] = []
        for key, _ in self._selector.select(max(0.0, min([timeout, *(end - time.monotonic() for end in ends)]))):
            link = cast(socket.socket, key.fileobj)
            if link is self._server:
                self._open()
            elif (hello := self._listen_to(link)) is not None:
                told.append((link, hello))
        now = time.monotonic()
        for link in [link for link, (_, end) in self._waiting.items() if end <= now]:
            self._turn_away(link)
        return told

    def _open(self) -> None:
        try:
            link, _ = self._server.accept()
        except OSError:  # it has left again
            return
        if len(self._waiting) >= self._place.num_processes + STRANGERS:
            self._turn_away(next(iter(self._waiting)))
        link.setblocking(False)
        self._waiting[link] = bytearray(), time.monotonic() + HELLO_S
        self._selector.register(link, selectors.EVENT_READ)

    def _listen_to(self, link: socket.socket) -> Hello | None:
        """What `link` has said, once it is complete and of this run."""
        said, _ = self._waiting[link]
        try:
            part = link.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError:
            part = b""
        said += part
        if not part or len(said) > LONGEST:
            self._turn_away(link)
            return None
        if not said.endswith(b"\n"):
            return None
        if (hello := self._hello(bytes(said))) is None:
            self._turn_away(link, b'{"other": true}\n')
            return None
        self._selector.unregister(link)
        del self._waiting[link]
        link.setblocking(True)
        return hello

    def _hello(self, line: bytes) -> Hello | None:
        try:
            said = json.loads(line)
            seat, pid, host = said["hello"]
            hello = Hello(Member(seat, pid, host), said["count"], said["error"], said["facts"])
            if not hmac.compare_digest(str(said["run"]).encode(), self._place.run.encode()):
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        numbers = all(type(number) is int for number in (seat, pid, hello.count))
        texts = type(host) is str and type(hello.error) in (str, type(None)) and type(hello.facts) is dict
        return hello if numbers and texts and seat >= 0 else None

    def _turn_away(self, link: socket.socket, answer: bytes = b"") -> None:
        self.strangers += 1
        self._selector.unregister(link)
        del self._waiting[link]
        with suppress(OSError):
            link.send(answer)
        link.close()


class Address(NamedTuple):
    """Where process 0 listens. host: an address of this machine; empty: all of them."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"port {self.port} of all addresses of this host" if not self.host else _host_port(self.host, self.port)

    def address(self, coordinator: str) -> str | None:
        """The same host with the port of `coordinator`, as JAX's service is told; None: all addresses."""
        return _host_port(self.host, int(coordinator.rpartition(":")[2])) if self.host else None


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(place: Place, say: Callable[[str], None]) -> tuple[socket.socket, Address]:
    """Listens at the coordinator's address, and there alone where it is an address of this machine.

    A host's name may mean a loopback address to the host itself, and the outer side of a router to others: then
    process 0 listens at all addresses.
    """
    for family, host in _addresses(place):
        if ipaddress.ip_address(host.partition("%")[0]).is_loopback and not is_loopback(place.host):
            continue
        try:
            return socket.create_server((host, place.port), family=family, backlog=BACKLOG), Address(host, place.port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise _cannot_listen(place, error) from error
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(
                ("", place.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        else:
            server = socket.create_server(("", place.port), backlog=BACKLOG)
    except OSError as error:
        raise _cannot_listen(place, error) from error
    say(f"{place.host} is no address of this host as it sees itself: process 0 listens at all of its addresses")
    return server, Address("", place.port)


def _addresses(place: Place) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in found))


def _cannot_listen(place: Place, error: OSError) -> UserError:
    in_use = error.errno == errno.EADDRINUSE
    return UserError(
        f"process 0 cannot listen at port {place.port} of {socket.gethostname()}, as the coordinator "
        f"{place.coordinator} says: {'another program uses it' if in_use else error.strerror}; set {COORDINATOR} "
        "to another port in all processes"
    )
