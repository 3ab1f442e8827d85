#!/usr/bin/env python3
"""Times the training step of this project beside that of PyTorch + transformers, on the same weights and tokens.

    python scripts/bench/train.py 10M                          a few minutes on two CPU cores
    python scripts/bench/train.py 10M --text stories.txt       on a text of your own
    python scripts/bench/train.py 1B --engines jaxllm torch torch-compile
    python scripts/bench/train.py --table                      the results so far

Each engine is a process of its own, so that thread pools and peak memory are its own; they take turns, a block of
steps each, so that whatever else the machine does meets both. First both train the same 20 steps, and the bench fails
unless their losses agree. Needs the extra [test]; results are JSON files in scripts/bench/results/train.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from job import SIZES, Job
from summary import largest_difference, ratios, spread, table

HERE = Path(__file__).parent
ENGINES = {
    "jaxllm": ["with_jaxllm.py"],
    "torch": ["with_torch.py"],
    "torch-compile": ["with_torch.py", "compile"],
}
LOSSES = 20
# Of a loss. In float32 rounding comes to 1e-6, which twenty updates of AdamW amplify; in bfloat16 to some 1e-3.
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}
PAUSE_S = 0.3  # after a block, until the threads of its engine sleep
BUSY = 0.5  # programs that compute while nothing is measured yet
ON_A_BUSY_MACHINE = (
    "speeds are not to be quoted: PyTorch's threads wait for the slowest of them at every operation, and lose more "
    "than XLA's when they cannot all run"
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, job: Job) -> None:
        file, *options = ENGINES[name]
        self._name = name
        self._process = _start(file, json.dumps(asdict(job)), *options, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def do(self, what: str, **arguments: Any) -> Any:
        """The answer to a command. Raises RuntimeError if the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the engine {self._name} ended with status {self._process.wait()}")
        time.sleep(PAUSE_S)
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _start(file: str, *arguments: str, **pipes: Any) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compiling is timed
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the peak is what was asked for, not what was set aside
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen([sys.executable, str(HERE / file), *arguments], text=True, env=environment, **pipes)


def bench(job: Job, size_name: str, names: Sequence[str], blocks: int, block_s: float) -> dict[str, Any]:
    """The result of one benchmark: every engine's numbers. Raises SystemExit if the losses differ."""
    size = SIZES[size_name]
    with ExitStack() as processes:
        workers = {name: processes.enter_context(closing(Worker(name, job))) for name in names}
        opened, seconds, losses = {}, {name: [] for name in names}, {}
        for name, worker in workers.items():
            opened[name] = worker.do("open")
            first = worker.do("steps", count=LOSSES)
            losses[name], opened[name]["first_step_s"] = first["losses"], first["seconds"][0]
            opened[name]["warm_s"] = spread(first["seconds"][LOSSES // 2 :])["median"]
            print(f"{name}: loss {losses[name][0]:.4f} → {losses[name][-1]:.4f}", file=sys.stderr)
        different = {name: largest_difference(losses[name], losses["torch"]) for name in names}
        tolerance = TOLERANCE[job.compute_dtype]
        agree = all(difference <= tolerance for difference in different.values())
        if not (agree and losses["torch"][-1] < losses["torch"][0]):
            raise SystemExit(f"the engines do not do the same work: {different} of the losses (allowed: {tolerance})")

        counts = {name: max(2, round(block_s / opened[name]["warm_s"])) for name in names}
        for number in range(blocks):
            for name, worker in workers.items():
                # The first step of a turn finds caches full of the other engine's data.
                seconds[name].append(worker.do("steps", count=counts[name] + 1)["seconds"][1:])
            print(f"block {number + 1} of {blocks}", file=sys.stderr)
        known: float | None = opened["jaxllm"]["known_peak_flops"]
        peak = known or max(worker.do("peak_flops") for worker in workers.values())
        memory = {name: worker.do("peak_bytes") for name, worker in workers.items()}

    tokens = size.batch_size * size.seq_len
    about = opened["jaxllm"]

    def numbers(name: str) -> dict[str, Any]:
        step = spread([second for block in seconds[name] for second in block])
        rate = tokens / step["median"]
        return {
            "step_s": step,
            "steps_a_block": counts[name],
            "tokens_per_s": rate,
            "mfu": about["flops_per_token"] * rate / peak,
            "mfu_useful": about["useful_flops_per_token"] * rate / peak,
            "peak_bytes": memory[name],
            "planned_bytes": opened[name].get("planned_bytes"),
            "attention": opened[name]["attention"],
            "compile_s": opened[name]["compile_s"],
            "first_step_s": opened[name]["first_step_s"],
            "speed_of_torch": ratios(seconds[name], seconds["torch"]),
            "losses": losses[name],
            "loss_difference": different[name],
        }

    on_cpu = about["device"] == "cpu"
    return {
        "size": size_name,
        "parameters": about["parameters"],
        "model": size.fields(),
        "batch_size": size.batch_size,
        "seq_len": size.seq_len,
        "param_dtype": job.param_dtype,
        "compute_dtype": job.compute_dtype,
        "device": f"{_processor()}, {os.cpu_count()} cores" if on_cpu else about["device"],
        "peak_flops": peak,
        "peak_is": "the vendor's" if known else "of the fastest product of two 2048 × 2048 matrices, measured here",
        "peak_bytes_are": "resident in the process" if on_cpu else "allocated on the device",
        "loss_tolerance": tolerance,
        "blocks": blocks,
        "engines": {name: numbers(name) for name in names},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _commit() -> str:
    """The commit of the code, with a `+` if it was changed since."""
    run = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=SIZES, help="parameters of the model")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["jaxllm", "torch"], help="who takes turns")
    parser.add_argument("--text", help="a text file (default: the source of Python's standard library)")
    parser.add_argument("--param-dtype", default="float32", choices=TOLERANCE, help="what parameters are stored in")
    parser.add_argument("--compute-dtype", default="float32", choices=TOLERANCE, help="what products are computed in")
    parser.add_argument("--blocks", type=int, default=8, help="turns of each engine")
    parser.add_argument("--block-s", type=float, default=4.0, help="seconds of a turn, about")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "train", help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print the results there are, and do nothing else")
    chosen = parser.parse_args()
    if not chosen.table:
        load = os.getloadavg()[0]
        if load > BUSY:
            print(f"note: the machine has a load of {load:.1f} already, so {ON_A_BUSY_MACHINE}", file=sys.stderr)
        if chosen.size is None:
            parser.error("give a size, or --table")
        if not {"jaxllm", "torch"} <= set(chosen.engines):
            parser.error("jaxllm and torch are what is compared; --engines must name both")
        with tempfile.TemporaryDirectory() as folder:
            text = [os.path.abspath(chosen.text)] if chosen.text else []
            if _start("prepare.py", chosen.size, chosen.param_dtype, folder, *text).wait():
                raise SystemExit("the weights and batches could not be made")
            job = Job(folder, chosen.param_dtype, chosen.compute_dtype)
            result = bench(job, chosen.size, chosen.engines, chosen.blocks, chosen.block_s)
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "load_before": load,
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "text": Path(chosen.text).name if chosen.text else "the source of Python's standard library",
        }
        chosen.results.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"\W+", "-", result["device"])
        (chosen.results / f"{chosen.size}-{device}.json").write_text(json.dumps({**result, **about}, indent=1) + "\n")
    results = [json.loads(file.read_text()) for file in sorted(chosen.results.glob("*.json"))]
    print(table(sorted(results, key=lambda result: result["parameters"])))


if __name__ == "__main__":
    main()
