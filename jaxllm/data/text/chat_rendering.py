"""Chat templates as text, written by a process of its own: a template is code of strangers, and it may never end."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.core.errors import UserError
from jaxllm.data.text.chat_rendering_process import SECONDS, read_frame, write_frame

Messages = Sequence[Mapping[str, Any]]


class Conversation(NamedTuple):
    """What a template is given: messages, the JSON schemas of tools, and whether it is to ask for an answer
    (`add_generation_prompt`)."""

    messages: Messages
    tools: Messages | None = None
    ask: bool = False


class Rendering(NamedTuple):
    """A conversation as text, and the spans of characters that stand in `{% generation %}` blocks."""

    text: str
    spans: list[tuple[int, int]]


class Failure(NamedTuple):
    """Why a template wrote nothing, the line of the template, where it has one, and whether it exceeded a limit."""

    reason: str
    line: int | None = None
    exceeds: bool = False

    def __str__(self) -> str:
        return (f" at line {self.line}: " if self.line else ": ") + self.reason


def render(
    template: str,
    conversations: Sequence[Conversation],
    *,
    variables: Mapping[str, Any] | None = None,
    now: str | None = None,
) -> list[Rendering | Failure]:
    """What transformers' `apply_chat_template` writes for each conversation, or why it writes nothing.

    A rendering has the limits of `chat_rendering_process`, of processor time, memory and text; one that exceeds them
    ends in a `Failure`, wherever the template is, and what follows it in `conversations` is not rendered. The process
    is started at the first call and kept. Many conversations in one call cost less than as many calls.

    Args:
        template: Jinja.
        conversations: see `Conversation`.
        variables: of the template, such as `bos_token`: plain values, no functions.
        now: the moment that `strftime_now` writes, in ISO 8601; None: the present one.
    Raises UserError where no process can be started.
    """
    request = {"template": template, "variables": variables or {}, "now": now}
    answer = _process.ask(request | _table(conversations))
    if not isinstance(answer, Failure):
        return answer
    if len(conversations) == 1:
        return [answer]
    # One of them ended the process; which one is found by rendering each by itself.
    found: list[Rendering | Failure] = []
    for conversation in conversations:
        alone = _process.ask(request | _table([conversation]))
        if isinstance(alone, Failure):
            return found + [alone] * (len(conversations) - len(found))
        found += alone
    return found


def _table(conversations: Sequence[Conversation]) -> dict[str, Any]:
    """The conversations with each of the messages, which many may share, written once."""
    places: dict[int, int] = {}
    objects: list[Any] = []

    def place(value: Any) -> int:
        if id(value) not in places:
            places[id(value)] = len(objects)
            objects.append(value)
        return places[id(value)]

    asked = [([place(message) for message in c.messages], place(c.tools), c.ask) for c in conversations]
    return {"objects": objects, "conversations": asked}


def _shown(value: Any) -> str:
    """What transformers shows a template of a value that JSON has not, such as a date of a Parquet file."""
    return f"<{type(value).__name__}>"


class _Process:
    """The process, started when it is first asked, and again after it ended or in a fork."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> list[Rendering | Failure] | Failure:
        """The answers to a request, or how the process ended over it."""
        try:
            written = json.dumps(request, default=_shown).encode()
        except RecursionError:
            return Failure("the record is nested too deeply")
        answer = self._exchange(written)
        if isinstance(answer, Failure):
            return answer
        return [
            Failure(*values) if failed else Rendering(values[0], [(start, end) for start, end in values[1]])
            for failed, *values in json.loads(answer)
        ]

    def _exchange(self, request: bytes) -> bytes | Failure:
        with self._lock:
            child = self._running()
            assert child.stdin
            assert child.stdout
            try:
                with contextlib.suppress(BrokenPipeError):
                    write_frame(child.stdin, request)
                answer = read_frame(child.stdout)
                return self._died(child) if answer is None else answer
            except BaseException:  # Ctrl-C: the answer to this request would be taken for the next one's
                self.stop()
                raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            command = f"from jaxllm.data.text.chat_rendering_process import serve; serve({self._seconds})"
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-c", command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
                )
            except OSError as error:
                raise UserError(f"cannot start the process that renders chat templates: {error}") from error
            atexit.register(self.stop)
        return self._child

    def forget(self) -> None:
        """In a fork: the process belongs to the parent, whose threads may hold the lock."""
        self._lock, self._child = threading.Lock(), None

    def stop(self) -> None:
        """Ends the process, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):  # half of a request was not read
                    stream.close()
        child.wait()

    def _died(self, child: subprocess.Popen[bytes]) -> Failure:
        self._child, status = None, child.wait()
        if status == -signal.SIGPROF:
            return Failure(f"it takes more than {self._seconds} second(s), so it may never end", exceeds=True)
        reason = f"the process that renders it ended with status {status}, as it does without memory"
        return Failure(reason, exceeds=True)


_process = _Process()
os.register_at_fork(after_in_child=_process.forget)
