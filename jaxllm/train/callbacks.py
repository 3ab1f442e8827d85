"""The callbacks of a run: which there are, what each is given, and in which order they see an event."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from jaxllm.callbacks.base import Callback, Event
from jaxllm.callbacks.evaluate import Evaluate, EvaluationSet
from jaxllm.callbacks.log import Log, MetricsFile
from jaxllm.callbacks.save import Save
from jaxllm.checkpoint.run_files import METRICS, RUN_CHECKPOINTS
from jaxllm.checkpoint.writer import CheckpointWriter
from jaxllm.core.console import saying
from jaxllm.core.hardware import peak_flops
from jaxllm.evaluate.perplexity import HeldOut, Perplexity
from jaxllm.processes.distributed import is_first
from jaxllm.step.state import TrainState
from jaxllm.train.metrics import flops_per_token
from jaxllm.train.program import Program
from jaxllm.train.progress import Progress


class Callbacks:
    """The log, the evaluation, the checkpoints, and what `callbacks:` in the config adds, in this order.

    Each is closed with `stack`, the last one first. first: metrics for the first line. stop: whether the run is told
    to. The held-out sets that are due before the first step are evaluated here, on `state`.
    """

    def __init__(
        self,
        stack: ExitStack,
        program: Program,
        progress: Progress,
        sets: Sequence[EvaluationSet],
        console: Console,
        state: TrainState,
        *,
        resumed: bool,
        first: Mapping[str, float],
        stop: Callable[[], bool],
    ) -> None:
        config, lm, began = program.config, program.lm, progress.began
        folder, resumed_at = Path(config.output_dir), began.step if resumed else None
        own = config.callbacks if is_first() else ()
        chosen = [stack.enter_context(closing(c.open(folder, resumed_at))) for c in own]
        metrics = stack.enter_context(closing(MetricsFile(folder / METRICS, resumed_at, chosen)))
        say = saying(console)
        for note in metrics.notes:
            say("note", note)
        writer = CheckpointWriter(folder / RUN_CHECKPOINTS, config.checkpoint, lm.layer_order, lm.paddable)
        save = stack.enter_context(closing(Save(writer, config.checkpoint, progress.facts, metrics)))
        self._evaluate = Evaluate(Perplexity(lm), program.weights, sets, metrics, console, last=began.steps, stop=stop)
        self._evaluate.before(state, began.step)
        log = Log(
            metrics,
            console,
            steps=began.steps,
            start=began.step,
            norms_every=config.metrics.norms_every,
            tokens_through=progress.tokens_through,
            flops=flops_per_token(lm, config.data.seq_len, config.peft.trained_at_a_time(lm)),
            peak=peak_flops(lm.layout),
            first=first,
            records=progress.records,
            max_bad_steps=config.train.max_bad_steps,
        )
        stack.enter_context(closing(log))
        self._each: tuple[Callback, ...] = (log, self._evaluate, save, *chosen)
        self._intervals = [every for every in (config.checkpoint.every, *(one.every for one in sets)) if every]

    def on_event(self, event: Event) -> None:
        """Passes the event on."""
        for callback in self._each:
            callback.on_event(event)

    def settles(self, step: int) -> bool:
        """Whether the state of `step` is waited for, because it is saved or evaluated."""
        return any(step % every == 0 for every in self._intervals)

    @property
    def evaluated(self) -> Mapping[str, Sequence[tuple[int, HeldOut]]]:
        """By the name of a held-out set, the step and result of each evaluation."""
        return self._evaluate.history
