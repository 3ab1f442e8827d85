"""The run's metrics: every step in metrics.jsonl, a progress bar with the time left, a line now and then."""

import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from pydantic import PositiveInt
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxllm.callbacks.base import Callback, Event
from jaxllm.core.config import Section
from jaxllm.core.errors import UserError
from jaxllm.processes.distributed import gather, is_first

# What a step tells under some settings only.
SOMETIMES = ("objective", "z_loss", "loss_scale", "overflow", "sophia_win_rate")
# Of the records of a bad step, how many are named.
RECORDS_NAMED = 50
# What a step tells of each group of parameters.
NORMS = ("grad_norm/", "param_norm/")


class MetricsConfig(Section):
    """What `metrics.jsonl` has besides every step's loss, times and rates."""

    norms_every: PositiveInt = 10
    """steps between lines with the norms of gradients and parameters by group, such as train/grad_norm/attn"""


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with its `step`. Each line goes to the `listeners` too.

    Every process holds it, and process 0 writes. notes: what to say about the lines that were dropped.
    """

    def __init__(self, path: Path, resumed_at: int | None, listeners: Sequence[Callback] = ()) -> None:
        """Opens the file to append.

        What a killed run wrote after step `resumed_at` is dropped; all of it, if None: the run begins anew. Lines that
        no run writes are dropped too. Raises UserError if the file cannot be read.
        """
        kept: list[str] = []
        self.notes: list[str] = []
        if is_first():
            there = _lines(path)
            if resumed_at is not None:
                kept = self._kept(path, there, resumed_at)
        evaluated = gather("\n".join(line for line in kept if '"eval/' in line))[0]
        self._evaluated: dict[str, dict[int, float]] = {}
        for line in map(json.loads, evaluated.splitlines()):
            self._note(line["step"], line)
        self._file = _replaced(path, kept) if is_first() else None
        self._listeners = listeners

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line, and hands it to the operating system at once."""
        self._note(step, values)
        if self._file is not None:
            line = {"step": step, **{name: _finite(value) for name, value in values.items()}}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for listener in self._listeners:
            listener.on_metrics(step, values)

    def values(self, name: str) -> Mapping[int, float]:
        """By step, the values of a metric `eval/…`, those from before a resume included."""
        return self._evaluated.get(name, {})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _kept(self, path: Path, lines: Sequence[bytes], resumed_at: int) -> list[str]:
        steps = [_step_of(line) for line in lines]
        if damaged := [number for number, step in enumerate(steps, 1) if step is None]:
            self.notes.append(
                f"{path}: lines dropped that no run writes, as a kill or a damaged disk leaves them: {len(damaged)} "
                f"(the first is line {damaged[0]})"
            )
        if again := sum(step is not None and step > resumed_at for step in steps):
            self.notes.append(f"{path}: lines dropped of steps after {resumed_at}, which are trained again: {again}")
        return [
            line.decode() for line, step in zip(lines, steps, strict=True) if step is not None and step <= resumed_at
        ]

    def _note(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name.startswith("eval/"):
                self._evaluated.setdefault(name, {})[step] = float(value)


def _replaced(path: Path, lines: Iterable[str]) -> TextIO:
    """The file, which holds `lines` now, open to append."""
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(line + "\n" for line in lines))
    new.replace(path)
    return path.open("a")


def _finite(value: float) -> float | str:
    """JSON has no NaN: a value that is not finite is written as text."""
    return value if math.isfinite(value) else str(value)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), and the run writes its metrics there; put the file back, or "
            "move it away, and the run resumes without its lines"
        ) from error


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for one that no run writes."""
    try:
        values = json.loads(line.decode())
        whole = isinstance(values, dict) and all(map(_is_value, values.values()))
    except (ValueError, RecursionError, OverflowError):
        return None
    step = values.get("step") if whole else None
    return step if isinstance(step, int) and step >= 0 else None


def _is_value(value: Any) -> bool:
    """Whether `value` is a number, as `_finite` writes it."""
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def memory_peaks() -> dict[str, float]:
    """The most memory held so far, in GiB.

    `mem/peak_gib`: of the fullest of this process's devices, where the device counts (on CPU it does not);
    `mem/host_peak_gib`: what this process had resident, which on CPU holds the arrays too.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peaks = {"mem/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if devices := [device["peak_bytes_in_use"] for device in stats if "peak_bytes_in_use" in device]:
        peaks["mem/peak_gib"] = max(devices) / 2**30
    return peaks


class Log(Callback):
    """Reports finished steps.

    norms_every: steps between lines that have the norms of each group. tokens_through: the real tokens seen through a
    step. flops: operations a token, by the papers' convention and the useful ones.
    peak: of all devices together in FLOP/s, if known. first: metrics for the first line (`perf/compile_s`, …).
    records: where the records of a step's batch come from. max_bad_steps: how many steps in a row may have a loss,
    gradient or parameter norm that is not finite (the step itself leaves the parameters alone then).
    """

    def __init__(
        self,
        metrics: MetricsFile,
        console: Console,
        *,
        steps: int,
        start: int,
        norms_every: int,
        tokens_through: Callable[[int], int],
        flops: tuple[float, float],
        peak: float | None,
        first: Mapping[str, float],
        records: Callable[[int], Sequence[str]],
        max_bad_steps: int,
    ) -> None:
        self._metrics = metrics
        self._console = console
        self._norms_every = norms_every
        self._tokens_through = tokens_through
        self._flops = flops
        self._peak = peak
        self._first = dict(first)
        self._records = records
        self._max_bad_steps = max_bad_steps
        self._bad_steps = 0
        self._steps = steps
        self._line_every = max(1, (steps - start) // 20)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, status="compiled")
        self._progress.start()

    def on_event(self, event: Event) -> None:
        """Writes the steps that finished. Raises UserError after too many bad ones in a row."""
        for step, values in event.finished.items():
            self._report(step, values)
            self._judge(step, values)

    def _report(self, step: int, values: Mapping[str, float]) -> None:
        tokens = self._tokens_through(step)
        rate = (tokens - self._tokens_through(step - 1)) / values["step_time_s"]
        line: dict[str, float] = {
            "train/loss": values["loss"],
            "train/grad_norm": values["grad_norm"],
            "train/learning_rate": values["learning_rate"],
            **{f"train/{name}": values[name] for name in SOMETIMES if name in values},
            "train/tokens": tokens,
            "train/trained_tokens": values["trained_tokens"],
            "perf/step_time_s": values["step_time_s"],
            "perf/data_wait_s": values["data_wait_s"],
            "perf/tokens_per_s": rate,
            **self._first,
        }
        self._first = {}
        if self._peak is not None:
            line["perf/mfu"], line["perf/mfu_useful"] = (flops * rate / self._peak for flops in self._flops)
        line |= memory_peaks()
        if step % self._norms_every == 0:
            line |= {f"train/{name}": value for name, value in values.items() if name.startswith(NORMS)}
        if values["bad"]:
            line["train/bad_steps_in_a_row"] = self._bad_steps + 1
        self._metrics.write(step, line)
        status = f"loss {values['loss']:.4f}  {rate:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, status=status)
        if step % self._line_every == 0 or step == self._steps:
            norm, learning_rate = values["grad_norm"], values["learning_rate"]
            self._console.print(
                f"step {step:>6}  loss {values['loss']:.4f}  grad norm {norm:.3f}  "
                f"learning rate {learning_rate:.2e}  {rate:,.0f} tokens/s",
                highlight=False,
                soft_wrap=True,
            )

    def _judge(self, step: int, values: Mapping[str, float]) -> None:
        if values.get("overflow"):  # neither good nor bad
            self._console.print(
                f"step {step:>6}  not applied: the gradient overflowed float16 at a loss scale of "
                f"{values['loss_scale']:g}, which is halved",
                highlight=False,
                soft_wrap=True,
            )
            return
        self._bad_steps = self._bad_steps + 1 if values["bad"] else 0
        if not self._bad_steps:
            return
        found = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        for name, norm in values.items():
            if name.startswith("param_norm/") and not math.isfinite(norm):
                found += f", norm of the parameters of {name.partition('/')[2]} {norm:.4g}"
        records = self._records(step)
        named = ", ".join(records[:RECORDS_NAMED])
        more = len(records) - RECORDS_NAMED
        self._console.print(
            f"step {step:>6}  not applied: {found}. Its records: {named}{f' and {more} more' if more > 0 else ''}",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
        if self._bad_steps >= self._max_bad_steps:
            raise UserError(
                f"{self._bad_steps} steps in a row up to step {step} had a loss, gradient or parameter norm that is "
                f"not finite (last: {found}). Look at the records named above, or start "
                "again from an earlier checkpoint (checkpoint.resume) in a new output_dir with a lower "
                "optim.learning_rate or a longer optim.schedule.warmup"
            )

    def close(self) -> None:
        """Ends the progress bar."""
        self._progress.stop()
