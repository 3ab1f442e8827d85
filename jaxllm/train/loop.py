"""The training loop: an iterator of events that knows no callback."""

import time
from collections.abc import Callable, Iterator

import jax

from jaxllm.callbacks.base import Event
from jaxllm.step.batch import Batch
from jaxllm.step.state import Metrics, Step, TrainState


def loop(
    step: Step,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    start: int,
    steps: int,
    settle: Callable[[int], bool] = lambda step: False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Runs updates `start` + 1 to `steps`, and yields an event for each as soon as it is dispatched.

    A step's metrics are read after the next one is dispatched, so that the device never waits for the host. Those of
    the last step, and of each for which `settle` says yes, come with their own event: whoever saves that step's state
    waits for it anyway, and finds its metrics reported. To the step's own metrics it adds `step_time_s` and
    `data_wait_s`. `stop` is asked before the first step and after each dispatch; if it says yes, that step is the last.
    """
    clock = _Clock()
    pending: dict[int, Metrics] = {}
    for done in range(start + 1, start + 1 if stop() else steps + 1):
        batch = clock.wait_for(lambda: next(batches))
        state, metrics = step(state, batch)
        clock.dispatched()
        last = done == steps or stop()
        settled = last or settle(done)
        ready, pending = (pending | {done: metrics}, {}) if settled else (pending, {done: metrics})
        event = Event(done, state, last, {number: clock.read(values) for number, values in ready.items()})
        yield event
        if event.last:
            return


class _Clock:
    """Times steps that overlap with the host's work."""

    def __init__(self) -> None:
        self._dispatched: list[float] = []
        self._waits: list[float] = []
        self._ready = 0.0

    def wait_for(self, batch: Callable[[], Batch]) -> Batch:
        start = time.monotonic()
        value = batch()
        self._waits.append(time.monotonic() - start)
        return value

    def dispatched(self) -> None:
        self._dispatched.append(time.monotonic())

    def read(self, metrics: Metrics) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        # A step begins when it is dispatched or, if the device was still busy then, when the one before ends.
        begun = max(self._dispatched.pop(0), self._ready)
        self._ready = time.monotonic()
        return {**values, "step_time_s": self._ready - begun, "data_wait_s": self._waits.pop(0)}
