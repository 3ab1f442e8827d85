"""Held-out evaluation during a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
from rich.console import Console

from jaxllm.callbacks.base import Callback, Event
from jaxllm.callbacks.log import MetricsFile
from jaxllm.core.tree import Params
from jaxllm.evaluate.perplexity import HeldOut, Perplexity
from jaxllm.step.state import TrainState

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class EvaluationSet:
    """A named held-out set: its batches, anew at each call, and the steps between evaluations."""

    name: str
    batches: Callable[[], Iterable[Batch]]
    every: int


class _Stopped(Exception):
    """The run is told to stop in the midst of an evaluation."""


class Evaluate(Callback):
    """Evaluates `weights` of the state on each set every so many steps and at the step `last`.

    When `stop` says that the run ends before, no evaluation begins, and the one at hand is broken off with the run's
    last step; both are made up for when the run goes on.

    `history`: by name, the step and result of each evaluation.
    """

    def __init__(
        self,
        perplexity: Perplexity,
        weights: Callable[[TrainState], Params],
        sets: Iterable[EvaluationSet],
        metrics: MetricsFile,
        console: Console,
        last: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._perplexity = perplexity
        self._weights = weights
        self._sets = list(sets)
        self._metrics = metrics
        self._console = console
        self._last = last
        self._stop = stop
        self.history: dict[str, list[tuple[int, HeldOut]]] = {}

    def on_event(self, event: Event) -> None:
        """Evaluates what is due."""
        for held_out in self._sets:
            if self._is_due(held_out, event.step):
                event.last |= not self._evaluate(held_out, event.step, event.state)

    def before(self, state: TrainState, step: int) -> None:
        """Evaluates what is due before the run begins, or goes on, after `step`, and has not been evaluated yet."""
        for held_out in self._sets:
            if self._is_due(held_out, step) and step not in self._metrics.values(f"eval/{held_out.name}/loss"):
                self._evaluate(held_out, step, state)

    def _is_due(self, held_out: EvaluationSet, step: int) -> bool:
        return step == self._last or step % held_out.every == 0

    def _evaluate(self, held_out: EvaluationSet, step: int, state: TrainState) -> bool:
        """Returns whether it came to an end."""
        try:
            batches = self._until_stopped(held_out.batches())
            result = self._perplexity(self._weights(state), batches)
        except _Stopped:
            return False
        self.history.setdefault(held_out.name, []).append((step, result))
        name = f"eval/{held_out.name}"
        self._metrics.write(step, {f"{name}/loss": result.loss, f"{name}/perplexity": result.perplexity})
        self._console.print(
            f"step {step:>6}  [bold]{held_out.name}[/bold] loss {result.loss:.4f}  perplexity "
            f"{result.perplexity:.2f}  over {result.tokens:,} tokens",
            highlight=False,
            soft_wrap=True,
        )
        return True

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._stop():
                raise _Stopped
            yield batch
