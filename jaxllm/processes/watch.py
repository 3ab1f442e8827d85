"""What becomes of a run of several processes when one of them fails, dies or hangs: all end, and one says why.

Each process is connected to process 0 (see `rendezvous`) and sends a beat every few seconds, with how far it has come.
Process 0 sees who has died (the connection ends, or falls silent) and who hangs (it does not get on, and the others
wait for it), and tells all of them to end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from pydantic import PositiveFloat

from jaxllm.core.config import Section
from jaxllm.processes.reception import LONGEST, Member
from jaxllm.processes.rendezvous import Meeting, send

POLL_S = 0.2
BEAT_S = 5.0
SAME_ERROR_S = 1.0  # in which process 0 may come to the error that another has reported
CAUSE_S = 3.0  # in which the death of another process is seen, of which an error here may come
FAREWELL_S = 10.0  # for which processes that end wait for one another


class DistributedConfig(Section):
    """Of a run of several processes: how long they wait for one another."""

    start_timeout: PositiveFloat = 300.0
    """seconds in which all processes must have come together"""
    dead_after: PositiveFloat = 60.0
    """a process of which nothing is heard for so many seconds is dead: it is named, and the others end. One that was
    killed is seen at once"""
    hang_after: PositiveFloat = 1800.0
    """seconds without a step, or a batch of an evaluation, after which the process that the others wait for is named,
    and all end; checkpoints must be written faster"""


class _Failure(NamedTuple):
    """Why all end. hung: seats of the processes that are to say where they stand."""

    status: int
    message: str
    at: float
    hung: tuple[int, ...] = ()


@dataclass
class _Peer:
    """Another process, as seen from here. ticks: how far it has come; None: it is not in the loop. left: it has said
    that it ends, or is dead."""

    member: Member
    link: socket.socket
    heard: float
    buffer: bytes = b""
    ticks: int | None = None
    since: float = 0.0
    left: bool = False
    dead: bool = False


@dataclass
class _Here:
    ticks: int | None = None
    since: float = field(default_factory=time.monotonic)


class Watch:
    """Watches the other processes on a thread, from now on until `close`."""

    def __init__(self, meeting: Meeting, config: DistributedConfig) -> None:
        now = time.monotonic()
        self._me = meeting.me
        self._config = config
        self._peers = [_Peer(meeting.members[seat], link, now) for seat, link in meeting.links.items()]
        self._here = _Here()
        self._failure: _Failure | None = None
        self._sending = threading.Lock()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._restore: Callable[[], object] = lambda: None
        for peer in self._peers:
            peer.link.settimeout(FAREWELL_S)
            peer.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(peer.link, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="watch-processes", daemon=True)
        self._thread.start()

    def before_end(self, restore: Callable[[], object]) -> None:
        """Calls `restore` before this process is ended by another: it brings the terminal in order."""
        self._restore = restore

    def tick(self) -> None:
        """Says that this process gets on. From the first tick to `rest` one that does not is taken for hanging."""
        self._here = _Here((self._here.ticks or 0) + 1)

    def rest(self) -> None:
        """Says that this process is not in the loop any more."""
        self._here = _Here()

    def fail(self, status: int, message: str) -> NoReturn:
        """Ends all processes with `status`; process 0 prints `message`."""
        self._report(status, message)
        self._thread.join(SAME_ERROR_S + 2 * FAREWELL_S)  # which ends the process
        self._say(message)
        self._exit(status)

    def interrupted(self, number: int, message: str) -> NoReturn:
        """Ends all processes after the signal `number`, this one at once."""
        message = f"{self._me} was ended by {signal.Signals(number).name}: {message}"
        if self._me.seat == 0:
            self.fail(128 + number, message)
        self._report(128 + number, message)
        self._exit(128 + number)

    def _report(self, status: int, message: str) -> None:
        if self._me.seat == 0:
            self._failure = _Failure(status, message, at=0.0)
            return
        told = f"{self._me}: {message}" if status == 2 else message
        with contextlib.suppress(OSError):
            self._send(self._peers[0], {"failed": status, "message": told})

    def crashed(self, error: BaseException) -> NoReturn:
        """Ends all processes after an error that nobody expected, unless the death of another process explains it."""
        self.rest()
        time.sleep(CAUSE_S)
        traceback.print_exception(error)
        first_line = str(error).partition("\n")[0]
        self.fail(1, f"{self._me} failed, and so the run ends: {type(error).__name__}: {first_line}")

    def close(self) -> None:
        """Takes leave of the other processes, which have come to their ends too."""
        with contextlib.suppress(OSError):
            for peer in self._peers:
                self._send(peer, {"bye": True})
        deadline = time.monotonic() + FAREWELL_S
        while not all(peer.left for peer in self._peers) and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
        self._closing = True
        self._thread.join()
        for peer in self._peers:
            peer.link.close()

    def _run(self) -> None:
        beat_every, next_beat = min(BEAT_S, self._config.dead_after / 4), 0.0
        while not self._closing:
            for key, _ in self._selector.select(POLL_S):
                self._receive(key.data)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + beat_every
                self._beat()
            self._judge(now)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.link)
            if not peer.left:
                self._lost(peer, "has died")
            return
        peer.heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data)[-LONGEST:].split(b"\n")
        for line in lines:
            self._act(peer, json.loads(line))

    def _act(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "ticks" in message:
            if message["ticks"] != peer.ticks:
                peer.ticks, peer.since = message["ticks"], peer.heard
        elif "failed" in message:
            peer.left = True  # it ends, or waits to be told to
            self._failure = self._failure or _Failure(message["failed"], message["message"], at=peer.heard)
        elif "end" in message:
            if message["dump"]:
                faulthandler.dump_traceback(sys.stderr)
            self._exit(message["end"])
        elif "bye" in message:
            peer.left = True

    def _beat(self) -> None:
        for peer in self._peers:
            if not peer.left:
                with contextlib.suppress(OSError):  # the next read of the connection tells
                    self._send(peer, {"ticks": self._here.ticks})

    def _judge(self, now: float) -> None:
        for peer in self._peers:
            if not peer.left and now - peer.heard > self._config.dead_after:
                self._lost(peer, f"has not been heard of for {self._config.dead_after:g} s")
        if self._me.seat != 0:
            return
        self._failure = self._failure or self._hang(now)
        if self._failure is not None and now - self._failure.at > SAME_ERROR_S:
            self._end(self._failure)

    def _lost(self, peer: _Peer, how: str) -> None:
        peer.left = peer.dead = True
        message = f"{peer.member} {how}, and so the run ends; the same command goes on from the newest checkpoint"
        if self._me.seat == 0:
            self._failure = self._failure or _Failure(1, message, at=0.0)
        elif not self._closing:
            self._say(message)
            self._exit(1)

    def _hang(self, now: float) -> _Failure | None:
        """The processes that are furthest behind, if they do not get on."""
        places: list[tuple[Member, _Here | _Peer]] = [(self._me, self._here)]
        places += [(peer.member, peer) for peer in self._peers]
        ticks = [place.ticks for _, place in places]
        if None in ticks:
            return None
        last = min(filter(None, ticks), default=0)
        behind = [(member, place) for member, place in places if place.ticks == last]
        if any(now - place.since <= self._config.hang_after for _, place in behind):
            return None
        after = f"in {self._config.hang_after:g} s (distributed.hang_after)"
        if len(behind) == len(places):
            message = f"no process has got on {after}: all wait for the devices or their network"
        else:
            named = ", ".join(str(member) for member, _ in behind)
            message = f"{named} {'has' if len(behind) == 1 else 'have'} not got on {after}, and the others wait for it"
        hung = tuple(member.seat for member, _ in behind)
        return _Failure(1, f"{message}; where it stands is in its output. The run ends", at=0.0, hung=hung)

    def _end(self, failure: _Failure) -> NoReturn:
        self._say(f"error: {failure.message}" if failure.status == 2 else failure.message)
        for peer in self._peers:
            with contextlib.suppress(OSError):
                self._send(peer, {"end": failure.status, "dump": peer.member.seat in failure.hung})
        if self._me.seat in failure.hung:
            faulthandler.dump_traceback(sys.stderr)
        # JAX's service ends with this process, and would end the others with a trace of its own.
        deadline = time.monotonic() + FAREWELL_S
        for peer in self._peers:
            with contextlib.suppress(OSError):
                if peer.dead:
                    continue
                peer.link.settimeout(max(0.01, deadline - time.monotonic()))
                while peer.link.recv(1 << 16):
                    pass
        self._exit(failure.status)

    def _send(self, peer: _Peer, message: dict[str, Any]) -> None:
        with self._sending:
            send(peer.link, message)

    def _say(self, message: str) -> None:
        self._restore()
        print(f"\n{message}", file=sys.stderr, flush=True)

    def _exit(self, status: int) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)
