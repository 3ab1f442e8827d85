#!/usr/bin/env python3
"""Compares optimizers: each recipe of configs/optimizers trains the same model on the same tokens.

    python scripts/bench/optimizers.py MODEL alpaca.json                     every recipe; a table and a figure
    python scripts/bench/optimizers.py MODEL alpaca.json --optimizers adamw adalomo --steps 500
    python scripts/bench/optimizers.py MODEL alpaca.json optim.learning_rate=1e-3     values of the config, for all

Runs follow one another, so that none takes time from another. The result is a JSON file and a figure beside it, the
loss against tokens and against seconds. Needs the extra [test].
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import CONFIGS, Run, markdown, overrides_of, parser_of, write

from jaxllm.processes.environment import prepare_backends

RECIPES = {path.stem: path for path in sorted((CONFIGS / "optimizers").glob("*.yaml"))}
RESULTS = Path(__file__).parent / "results" / "optimizers.json"
COLUMNS = ("optimizer", "rate", "loss before", "after", "step s (quartiles)", "tokens/s", "planned MiB")


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, the lowest loss first."""
    lines: list[Sequence[str]] = [COLUMNS]
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
    return markdown(lines)


def main() -> None:
    """The command."""
    asked = parser_of("optimizers", list(RECIPES), __doc__, RESULTS).parse_intermixed_args()
    prepare_backends()
    results = {}
    for name in asked.optimizers:
        results[name] = Run(RECIPES[name]).measured(overrides_of(asked))
        print(f"{name}: {results[name]['held_out_loss']['after']:.4f}", file=sys.stderr)
    write(asked, results, optimizers=results)
    print(table(results))


if __name__ == "__main__":
    main()
