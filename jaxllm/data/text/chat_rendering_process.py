"""The process that renders chat templates, within limits that the kernel keeps: see `chat_rendering`."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import struct
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

SECONDS = 5  # of processor time for one rendering
MEMORY = 2 << 30  # bytes that all of it may take …
CHARACTERS = 100_000_000  # … and the text of one rendering

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # a template with these says itself what is trained

_SIZE = struct.Struct("<Q")


def write_frame(stream: BinaryIO | Any, payload: bytes) -> None:
    """Sends bytes, with their number in front."""
    stream.write(_SIZE.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def read_frame(stream: BinaryIO | Any) -> bytes | None:
    """The bytes of one `write_frame`; None where the other end is closed."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    size = _SIZE.unpack(head)[0]
    payload = stream.read(size)
    return payload if len(payload) == size else None


def serve(seconds: int) -> None:
    """Answers requests on standard input, each with one JSON list on standard output, until the input ends.

    seconds: of processor time for one rendering; one that takes more ends the process by SIGPROF.
    """
    # Ctrl-C is for the process that asks, which ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The timer's signal ends the process, whatever it does: a handler in Python would wait for the end of a call in C.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    from transformers.utils import chat_template_utils as templates

    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    _limit_memory()
    while (request := read_frame(sys.stdin.buffer)) is not None:
        asked = json.loads(request)
        objects = asked["objects"]
        found = [
            _limited(seconds, templates, asked, [objects[place] for place in places], objects[tools], ask)
            for places, tools, ask in asked["conversations"]
        ]
        try:
            answer = json.dumps(found).encode()
        except MemoryError:
            answer = json.dumps([_failure(MemoryError())] * len(found)).encode()
        write_frame(answers, answer)


def _limit_memory() -> None:
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux, where alone the limit counts what this process takes
        return
    limit, hard = used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limited(
    seconds: int, templates: Any, asked: dict[str, Any], messages: list[Any], tools: list[Any] | None, ask: bool
) -> tuple[Any, ...]:
    """Whether the template failed; then the text and its spans, or the fields of a `Failure`."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        text, spans = _render(templates, asked, messages, tools, ask)
        if len(text) > CHARACTERS:
            return _failure(MemoryError())
        return False, text, spans
    except Exception as error:  # a template can raise whatever Python can
        return _failure(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _render(
    templates: Any, asked: dict[str, Any], messages: list[Any], tools: list[Any] | None, ask: bool
) -> tuple[str, list[Any]]:
    template = asked["template"]
    compiled = templates._compile_jinja_template(template)
    moment = datetime.fromisoformat(asked["now"]) if asked["now"] else datetime.now()
    compiled.environment.globals["strftime_now"] = moment.strftime
    (text,), spans = templates.render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=MARKS.search(template) is not None,
        add_generation_prompt=ask,
        **asked["variables"],
    )
    return text, spans[0] if spans else []


def _failure(error: Exception) -> tuple[bool, str, int | None, bool]:
    reason, exceeds = str(error)[:1000] or type(error).__name__, isinstance(error, MemoryError)
    if exceeds:
        reason = f"it needs more than {MEMORY >> 30} GiB of memory, or writes more than {CHARACTERS:,} characters"
    return True, reason, _line(error), exceeds


def _line(error: Exception) -> int | None:
    """The line of the template at which `error` came up."""
    if (line := getattr(error, "lineno", None)) is not None:
        return line
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)
