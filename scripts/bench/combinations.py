#!/usr/bin/env python3
"""Trains on every mesh of eight simulated devices, with every method, accumulating or not, packed or not, with a tied
head or not, and compares each run with that of one device, in float64.

    python scripts/bench/combinations.py             an hour or two on two cores; started again, it goes on

Needs the extra [test], and the tests beside it. The result is a JSON file of the largest difference of each.
"""

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from rich.progress import track  # noqa: E402

from jaxllm.core.versions import environment  # noqa: E402
from tests.conftest import jax  # noqa: E402  (eight devices are set before it is there)
from tests.support.mesh_table import METHODS, TOLERANCE, every  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "combinations.json"


def main() -> int:
    """The command. 1: some are not equal to one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time, as the tests do
    partial = asked.results.with_suffix(".jsonl")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    there = {tuple(one["of"]) for one in done}
    left = [one for one in every() if one not in there and one.method in asked.methods]
    with partial.open("a") as file:
        for one in track(left, description="combinations"):
            start = time.monotonic()
            done.append({"of": [*one], "difference": one.difference(), "seconds": round(time.monotonic() - start, 1)})
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    about = {name: value for name, value in environment().items() if name not in ("command", "devices")}
    about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine()}
    lines = ",\n".join(f"  {json.dumps(one)}" for one in done)
    head = json.dumps({**about, "tolerance": TOLERANCE}, indent=1)[:-2]
    asked.results.write_text(f'{head},\n "combinations": [\n{lines}\n ]\n}}\n')
    partial.unlink()
    wrong = [one for one in done if not one["difference"] <= TOLERANCE]
    worst = max(one["difference"] for one in done)
    print(f"{len(done)} combinations, the largest difference {worst:.1e}; {len(wrong)} above {TOLERANCE:.0e}")
    for one in wrong:
        print(one)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
