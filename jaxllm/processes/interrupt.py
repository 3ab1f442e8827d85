"""Stopping a run by a signal."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

from rich.console import Console

from jaxllm.processes.distributed import Largest
from jaxllm.processes.watch import Watch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While active, SIGINT (Ctrl-C) and SIGTERM end the process at once, with 128 + the signal as its exit status.

    Inside `graceful()`, the first one is noted instead, and the second one ends the process. A thread of
    its own acts on them: Python's own handlers wait while the main thread compiles, evaluates or copies.

    Of several processes each may get a signal, and all stop by it at the same step; `watch`: over them. `signal` is
    what they have agreed on.
    """

    def __init__(self, console: Console, watch: Watch | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._console = console
        self._processes = watch
        self._noted: signal.Signals | None = None
        self._largest = Largest()
        self._graceful = False
        self._before: dict[signal.Signals, Any] = {}

    def stopped(self) -> bool:
        """Whether the run was told to stop. Every process must ask equally often, and all get the same answer."""
        if self._processes is not None:
            self._processes.tick()
        if self.signal is None and (agreed := self._largest(self._noted or 0)):
            self.signal = signal.Signals(agreed)
            if self._noted is None:
                self._say(f"{self.signal.name} to another process: the run ends after this step and saves it")
        return self.signal is not None

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """The first signal is only noted here."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False
            if self._processes is not None:
                self._processes.rest()

    def __enter__(self) -> "Interrupt":
        arrived, self._arrives = os.pipe()
        os.set_blocking(self._arrives, False)
        self._wakeup_before = signal.set_wakeup_fd(self._arrives, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, args=(arrived,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._arrives)

    def _watch(self, arrived: int) -> None:
        while number := os.read(arrived, 1):
            if number[0] in SIGNALS:
                self._act(signal.Signals(number[0]))
        os.close(arrived)

    def _act(self, number: signal.Signals) -> None:
        if not self._graceful or self._noted is not None:
            self._end(number)
        self._noted = number
        if self._processes is None:
            self.signal = number
        self._say(f"{number.name}: the run ends after this step and saves it; once more ends it at once")

    def _say(self, message: str) -> None:
        self._console.print(message, highlight=False, soft_wrap=True)

    def _end(self, number: signal.Signals) -> NoReturn:
        self._console.show_cursor(True)
        message = "interrupted; the same command goes on from the newest checkpoint, if there is one"
        if self._processes is not None:
            self._processes.interrupted(number, message)
        print(f"\n{message}", file=sys.stderr, flush=True)
        os._exit(128 + number)
