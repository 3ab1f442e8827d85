"""The loop's promises, with a step that only counts."""

from itertools import count

import jax.numpy as jnp

from jaxllm.train.loop import loop
from jaxllm.train.state import TrainState

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
    seen = events(start=0, steps=100, stop=lambda: next(asked) == 3)
    assert [event.step for event in seen] == [1, 2, 3]
    assert seen[-1].last
    assert [step for event in seen for step in event.finished] == [1, 2, 3]
