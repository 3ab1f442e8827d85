#!/usr/bin/env python3
"""Compares optimizers: each recipe of configs/optimizers trains the same model on the same tokens.

    python scripts/bench/optimizers.py MODEL alpaca.json                     every recipe; a table and a figure
    python scripts/bench/optimizers.py MODEL alpaca.json --optimizers adamw adalomo --steps 500
    python scripts/bench/optimizers.py MODEL alpaca.json optim.learning_rate=1e-3     values of the config, for all

Runs follow one another, so that none takes time from another. The result is a JSON file and a figure beside it, the
loss against tokens and against seconds. Needs the extra [test].
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from summary import spread

from jaxllm.core.process import without_idle_cuda
from jaxllm.core.versions import environment

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "optimizers").glob("*.yaml"))}
RESULTS = Path(__file__).parent / "results" / "optimizers.json"
COLUMNS = ("optimizer", "rate", "loss before", "after", "step s (quartiles)", "tokens/s", "planned MiB")


def train(recipe: Path, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
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


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, the lowest loss first."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for name, result in sorted(results.items(), key=lambda item: item[1]["held_out_loss"]["after"]):
        loss, step = result["held_out_loss"], result["step_s"]
        lines.append(
            (
                name,
                f"{result['learning_rate']:.1e}",
                f"{loss['before']:.3f}",
                f"{loss['after']:.3f}",
                f"{step['median']:.3f} ({step['q25']:.3f}–{step['q75']:.3f})",
                f"{result['tokens_per_s']:,.0f}",
                f"{result['planned_bytes'] / 2**20:,.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict[str, dict[str, Any]], title: str, file: Path) -> None:
    """Two curves of each run: the loss, smoothed, against tokens and against seconds."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    styles = [(f"C{colour}", line) for line in ("-", "--", ":") for colour in range(8)]
    for (name, result), (colour, line) in zip(sorted(results.items()), styles, strict=False):
        smooth = list(smoothed(result["losses"]))
        for panel, axis in zip(panels, ("tokens", "seconds"), strict=True):
            panel.plot(result[axis], smooth, line, color=colour, label=name, linewidth=1.4)
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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what they all start from: a Hugging Face folder, or a name of the Hub")
    parser.add_argument("data", help="the records, as in data.sources")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values of the config, for all")
    parser.add_argument("--optimizers", nargs="+", choices=RECIPES, default=list(RECIPES), help="which recipes")
    parser.add_argument("--steps", type=int, default=200, help="updates of each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file to write, and the .svg beside it")
    asked = parser.parse_intermixed_args()
    without_idle_cuda()
    same = [f"model.path={asked.model}", f"data.sources.0.path={asked.data}", f"train.steps={asked.steps}"]
    results = {}
    for name in asked.optimizers:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = result_of(train(RECIPES[name], Path(folder) / "run", [*same, *asked.overrides]))
        print(f"{name}: {results[name]['held_out_loss']['after']:.4f}", file=sys.stderr)
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
    asked.results.write_text(json.dumps({**about, "optimizers": results}, indent=1) + "\n")
    draw(results, f"{about['model']} on {about['data']}", asked.results.with_suffix(".svg"))
    print(table(results))


if __name__ == "__main__":
    main()
