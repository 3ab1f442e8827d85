"""What a callback is, and how a config chooses one."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.core.config import Section
from jaxllm.core.registry import Registry
from jaxllm.step.state import TrainState


@dataclass
class Event:
    """A step has been dispatched.

    step: updates done when it is finished. state: the state after it, valid until the next event is asked for.
    finished: `{step: metrics}` of the steps whose results have arrived since the last event. last: whether this is
    the last event, because the run is complete or was told to stop; a callback may set it at a step that is settled.
    """

    step: int
    state: TrainState
    last: bool
    finished: Mapping[int, Mapping[str, float]]


class Callback:
    """Sees what happens in a run, in the order of the callbacks. A method that is not overridden does nothing."""

    def on_event(self, event: Event) -> None:
        """Called after each dispatched step; `event.state` may be read until this returns."""

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Called for each line of `metrics.jsonl`, with the names that it has there."""

    def close(self) -> None:
        """Called once, when the run ends in whatever way."""


class CallbackConfig(Section):
    """An item of `callbacks:`. Of a run of several processes, process 0 alone opens it."""

    type: Any
    """The name of the callback, as each section narrows it."""

    @abstractmethod
    def open(self, folder: Path, resumed_at: int | None) -> Callback:
        """The callback of the run in `folder`, which goes on after step `resumed_at`; None: it begins anew."""


CALLBACKS = Registry[type[CallbackConfig]]("callback")
