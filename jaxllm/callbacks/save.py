"""Checkpoints during a run."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxllm.callbacks.base import Callback, Event
from jaxllm.callbacks.log import MetricsFile
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.checkpoint.writer import CheckpointWriter, Saved


class Save(Callback):
    """Saves every `config.every` steps (None: never by itself), and at the last one, done or interrupted.

    facts: what to store beside the state, for a step. metrics: has the values that `config.best` compares, and gets
    `ckpt/save_s` and `ckpt/blocked_s` of each checkpoint's step when it is complete, which is some steps later.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        config: CheckpointConfig,
        facts: Callable[[int], Mapping[str, Any]],
        metrics: MetricsFile,
    ) -> None:
        self._writer = writer
        self._config = config
        self._facts = facts
        self._metrics = metrics

    def on_event(self, event: Event) -> None:
        """Saves if this step is due."""
        every = self._config.every
        if event.last or (every is not None and event.step % every == 0):
            scores = self._metrics.values(self._config.best) if self._config.best is not None else {}
            self._note(self._writer.save(event.step, event.state, self._facts(event.step), scores))
        else:
            self._note(self._writer.finished())

    def close(self) -> None:
        """Waits until the last checkpoint is complete."""
        self._note(self._writer.close())

    def _note(self, finished: Iterable[Saved]) -> None:
        for saved in finished:
            self._metrics.write(saved.step, {"ckpt/save_s": saved.save_s, "ckpt/blocked_s": saved.blocked_s})
