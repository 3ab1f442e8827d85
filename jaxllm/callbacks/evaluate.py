"""Held-out evaluation during a run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
from rich.console import Console

from jaxllm.callbacks.base import Callback
from jaxllm.callbacks.log import MetricsFile
from jaxllm.core import tree
from jaxllm.evaluate.perplexity import HeldOut, Perplexity
from jaxllm.train.state import Event, TrainState


@dataclass(frozen=True)
class EvaluationSet:
    """A named held-out set: its batches, anew at each call, and the steps between evaluations."""

    name: str
    batches: Callable[[], Iterable[Mapping[str, jax.Array]]]
    every: int


class Evaluate(Callback):
    """Evaluates each set every so many steps and at the step `last`.

    `history`: by name, the step and result of each evaluation.
    """

    def __init__(
        self,
        perplexity: Perplexity,
        sets: Iterable[EvaluationSet],
        metrics: MetricsFile,
        console: Console,
        last: int,
    ) -> None:
        self._perplexity = perplexity
        self._sets = list(sets)
        self._metrics = metrics
        self._console = console
        self._last = last
        self.history: dict[str, list[tuple[int, HeldOut]]] = {}

    def on_event(self, event: Event) -> None:
        """Evaluates what is due."""
        for held_out in self._sets:
            if event.step == self._last or event.step % held_out.every == 0:
                self._evaluate(held_out, event.step, event.state)

    def before(self, state: TrainState) -> None:
        """Evaluates every set before the first step."""
        for held_out in self._sets:
            self._evaluate(held_out, 0, state)

    def _evaluate(self, held_out: EvaluationSet, step: int, state: TrainState) -> None:
        result = self._perplexity(tree.combine(state.params, state.frozen), held_out.batches())
        self.history.setdefault(held_out.name, []).append((step, result))
        name = f"eval/{held_out.name}"
        self._metrics.write(step, {f"{name}/loss": result.loss, f"{name}/perplexity": result.perplexity})
        self._console.print(
            f"step {step:>6}  [bold]{held_out.name}[/bold] loss {result.loss:.4f}  perplexity "
            f"{result.perplexity:.2f}  over {result.tokens:,} tokens",
            highlight=False,
            soft_wrap=True,
        )
