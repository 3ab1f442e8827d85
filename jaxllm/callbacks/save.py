"""Checkpoints during a run."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.callbacks.base import Callback
from jaxllm.checkpoint.store import CheckpointStore
from jaxllm.train.state import Event


class Save(Callback):
    """Saves every `every` steps (None: never by itself), and at the last one, done or interrupted.

    facts: what to store beside the state, for a step.
    """

    def __init__(self, store: CheckpointStore, every: int | None, facts: Callable[[int], Mapping[str, Any]]) -> None:
        self._store = store
        self._every = every
        self._facts = facts

    def on_event(self, event: Event) -> None:
        """Saves if this step is due."""
        if event.last or (self._every is not None and event.step % self._every == 0):
            self._store.save(event.step, event.state, self._facts(event.step))

    def close(self) -> None:
        """Waits until the last checkpoint is complete."""
        self._store.close()
