"""The loop's promises, with a step that only counts."""

import time
from itertools import count

import jax.numpy as jnp
import numpy as np

from jaxllm.step.state import TrainState
from jaxllm.train.loop import loop

START = TrainState(jnp.zeros((), jnp.int32), {}, {}, ())


def counting(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    return state._replace(step=state.step + 1), {"loss": jnp.float32(10 * batch["number"])}


def events(**how) -> list:
    return list(loop(counting, START, iter({"number": number} for number in count(1)), **how))


def test_metrics_come_one_step_late_and_the_last_event_carries_the_rest() -> None:
    seen = events(start=0, steps=4)
    assert [event.step for event in seen] == [1, 2, 3, 4]
    assert [list(event.finished) for event in seen] == [[], [1], [2], [3, 4]]
    assert [event.last for event in seen] == [False, False, False, True]
    finished = {step: values for event in seen for step, values in event.finished.items()}
    assert [finished[step]["loss"] for step in (1, 2, 3, 4)] == [10, 20, 30, 40]
    assert all(values["step_time_s"] > 0 and values["data_wait_s"] >= 0 for values in finished.values())
    assert [int(event.state.step) for event in seen] == [1, 2, 3, 4]


def test_a_step_that_is_saved_or_evaluated_reports_at_once() -> None:
    seen = events(start=0, steps=5, settle=lambda step: step % 2 == 0)
    assert [list(event.finished) for event in seen] == [[], [1, 2], [], [3, 4], [5]]


def test_it_goes_on_from_a_step() -> None:
    seen = events(start=7, steps=9)
    assert [event.step for event in seen] == [8, 9]
    assert [step for event in seen for step in event.finished] == [8, 9]


def test_nothing_is_left_to_do() -> None:
    assert events(start=3, steps=3) == []


def test_it_stops_when_told_and_reports_everything() -> None:
    asked = count(1)
    seen = events(start=0, steps=100, stop=lambda: next(asked) == 4)  # once before the first step
    assert [event.step for event in seen] == [1, 2, 3]
    assert seen[-1].last
    assert events(start=0, steps=100, stop=lambda: True) == []
    assert [step for event in seen for step in event.finished] == [1, 2, 3]


def test_it_ends_with_the_step_whose_event_is_made_the_last() -> None:
    seen = []
    for event in loop(counting, START, iter([{"number": 1}] * 9), start=0, steps=9, settle=lambda step: step == 2):
        seen.append(event)
        event.last = event.step == 2
    assert [event.step for event in seen] == [1, 2]
    assert list(seen[-1].finished) == [1, 2]


class Metric:
    """A number on a fake device: reading it is noted, and waits until the device has it."""

    def __init__(self, step: int, ready: float, log: list[str]) -> None:
        self.step, self.ready, self.log = step, ready, log

    def __array__(self) -> np.ndarray:
        time.sleep(max(0.0, self.ready - time.monotonic()))
        self.log.append(f"read {self.step}")
        return np.float32(self.step)


class Device:
    """Runs steps one after the other, `seconds` each, while the host goes on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.log, self._free = seconds, [], 0.0

    def run(self, state: int, batch: object) -> tuple[int, dict]:
        self.log.append(f"run {state + 1}")
        self._free = max(self._free, time.monotonic()) + self.seconds
        return state + 1, {"loss": Metric(state + 1, self._free, self.log)}


def test_the_device_never_waits_for_the_host() -> None:
    """Each step is dispatched before the metrics of the one before are read, and read before its event is handled."""
    device = Device(0.0)
    for event in loop(device.run, 0, iter("abc"), start=0, steps=3):
        device.log.append(f"event {event.step}")
    assert device.log == ["run 1", "event 1", "run 2", "read 1", "event 2", "run 3", "read 2", "read 3", "event 3"]


def test_step_times_add_up_to_the_time_of_the_device() -> None:
    """However the host's work overlaps with it: nothing is counted twice, nothing is left out."""
    steps, seconds = 8, 0.02
    device, begun, times = Device(seconds), time.monotonic(), []
    for event in loop(device.run, 0, count(), start=0, steps=steps):
        time.sleep(seconds / 2 * (event.step % 3))  # now faster than the device, now as slow
        times += [values["step_time_s"] for values in event.finished.values()]
    assert 0.99 * steps * seconds <= sum(times) <= time.monotonic() - begun


def test_waiting_for_data_is_told() -> None:
    def slow():
        for name in "abc":
            time.sleep(0.02)
            yield name

    seen = list(loop(Device(0.0).run, 0, slow(), start=0, steps=3))
    waits = [values["data_wait_s"] for event in seen for values in event.finished.values()]
    assert len(waits) == 3
    assert min(waits) >= 0.02
