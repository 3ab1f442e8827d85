"""What comparisons of whole runs have in common: each trains in a process of its own, one after the other."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from summary import spread

from jaxllm.core.versions import environment

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Run:
    """A recipe, and the values of its config that are changed."""

    recipe: Path
    changes: Sequence[str] = ()

    def measured(self, overrides: Sequence[str]) -> dict[str, Any]:
        """What the run comes to, `overrides` being of all runs. Raises SystemExit if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            return result_of(metrics(self.recipe, Path(folder) / "run", [*overrides, *self.changes]))


def metrics(recipe: Path, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of a run in a process of its own. Raises SystemExit if it fails."""
    command = [sys.executable, "-m", "jaxllm.train", str(recipe), f"output_dir={folder}", *overrides]
    with (folder.parent / "log.txt").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"{recipe.name} ended with status {status}:\n{(folder.parent / 'log.txt').read_text()}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result_of(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run's metrics come to. seconds: of the steps alone, without compiling and evaluation."""
    steps = [line for line in lines if "train/loss" in line]
    held_out = [line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line]
    seconds = [line["perf/step_time_s"] for line in steps]
    return {
        "learning_rate": max(line["train/learning_rate"] for line in steps),
        "held_out_loss": {"before": held_out[0], "after": held_out[-1]},
        "step_s": spread(seconds[len(seconds) // 4 :]),
        "tokens_per_s": steps[-1]["train/tokens"] / sum(seconds),
        "planned_bytes": round(steps[0]["mem/planned_gib"] * 2**30),
        "compile_s": steps[0]["perf/compile_s"],
        "losses": [line["train/loss"] for line in steps],
        "tokens": [line["train/tokens"] for line in steps],
        "seconds": list(accumulate(seconds)),
    }


def parser_of(what: str, names: Sequence[str], description: str | None, results: Path) -> argparse.ArgumentParser:
    """The arguments that all comparisons take; `what` their runs differ in, by `names`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what they all start from: a Hugging Face folder, or a name of the Hub")
    parser.add_argument("data", help="the records, as in data.sources")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values of the config, for all")
    parser.add_argument(f"--{what}", nargs="+", choices=names, default=list(names), help="which; default: all")
    parser.add_argument("--steps", type=int, default=200, help="updates of each")
    parser.add_argument("--results", type=Path, default=results, help="the JSON file to write, and the .svg beside it")
    return parser


def overrides_of(asked: argparse.Namespace) -> list[str]:
    """The values of the config that all runs have."""
    same = [f"model.path={asked.model}", f"data.sources.0.path={asked.data}", f"train.steps={asked.steps}"]
    return [*same, *asked.overrides]


def write(asked: argparse.Namespace, runs: Mapping[str, dict[str, Any]], **content: Any) -> None:
    """Writes the JSON file, of `content` and of what it was measured on, and the figure of `runs`."""
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in environment().items() if name != "command"},
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "model": Path(asked.model).name,
        "data": Path(asked.data).name,
        "steps": asked.steps,
        "overrides": asked.overrides,
    }
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps({**about, **content}, indent=1) + "\n")
    draw(runs, f"{about['model']} on {about['data']}", asked.results.with_suffix(".svg"))


def draw(runs: Mapping[str, dict[str, Any]], title: str, file: Path) -> None:
    """Two curves of each run: the loss, smoothed, against tokens and against seconds."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    styles = [(f"C{colour}", line) for line in ("-", "--", ":") for colour in range(8)]
    for (name, run), (colour, line) in zip(sorted(runs.items()), styles, strict=False):
        smooth = list(smoothed(run["losses"]))
        for panel, axis in zip(panels, ("tokens", "seconds"), strict=True):
            panel.plot(run[axis], smooth, line, color=colour, label=name, linewidth=1.4)
    for panel, axis in zip(panels, ("tokens", "seconds of training steps"), strict=True):
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[1].legend(ncols=2, fontsize="small")
    figure.suptitle(title)
    figure.savefig(file)
    pyplot.close(figure)


def smoothed(losses: Sequence[float], weight: float = 0.9) -> Iterator[float]:
    """The moving average with the weight of a step falling by `weight` each step, without a bias to zero."""
    total = count = 0.0
    for loss in losses:
        total, count = weight * total + loss, weight * count + 1
        yield total / count


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its head first."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rest))
