"""What a benchmark's numbers come to."""

from collections.abc import Sequence
from statistics import quantiles
from typing import Any

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def ratios(blocks: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times as fast as the reference, block by block: each pair ran one after the other."""
    pairs = zip(blocks, reference, strict=True)
    return spread([spread(theirs)["median"] / spread(ours)["median"] for ours, theirs in pairs])


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses; not a number, if one is not."""
    ours, theirs = np.array(losses), np.array(others)
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


TIMES = ("step s (quartiles)", "tokens/s", "MFU", "useful", "peak GiB", "compile s", "speed (quartiles)", "load")
COLUMNS = ("size", "device", "engine", *TIMES)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table. speed: times that of eager PyTorch. load: of the machine, before it began."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for result in results:
        for name, engine in result["engines"].items():
            step, ratio = engine["step_s"], engine["speed_of_torch"]
            lines.append(
                (
                    result["size"],
                    result["device"],
                    name,
                    f"{step['median']:.3f} ({step['q25']:.3f}–{step['q75']:.3f})",
                    f"{engine['tokens_per_s']:,.0f}",
                    _share(engine["mfu"]),
                    _share(engine["mfu_useful"]),
                    f"{engine['peak_bytes'] / 2**30:.2f}",
                    f"{engine['compile_s']:.1f}",
                    f"{ratio['median']:.2f} ({ratio['q25']:.2f}–{ratio['q75']:.2f})",
                    f"{result['load_before']:.1f}",
                )
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
