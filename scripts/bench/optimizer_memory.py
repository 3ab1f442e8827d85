#!/usr/bin/env python3
"""The bytes that each optimizer takes for a parameter, as the compiled training step has them: no GPU is needed.

    python scripts/bench/optimizer_memory.py                       every optimizer on an H200, about ten minutes
    python scripts/bench/optimizer_memory.py lomo adamw --layers 4

The steps of a model of Llama 2 7B's shape are compiled with one short sequence, so that little of what they hold is
activations: float32 parameters in mixed precision, bfloat16 ones, and bfloat16 ones with the fused update. Optimizer
state is float32 in all of them. Needs the extra [plan]; without it, steps are compiled for a CPU, in float32.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import yaml

from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.core.hardware import TARGETS
from jaxllm.core.versions import environment
from jaxllm.optim.build import OPTIMIZERS
from jaxllm.plan.plan import Plan, devices_for, plan
from jaxllm.plan.targets import missing_wheels, target_named
from jaxllm.processes.environment import quiet_libraries
from jaxllm.runs.config import Config

RESULTS = Path(__file__).parent / "results" / "optimizer_memory.json"
LLAMA_2_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
TOKENS = 256
# The parameters, and how they are updated.
FORMS = {
    "float32": ["train.param_dtype=float32", "train.remat=full"],
    "bfloat16": ["train.param_dtype=bfloat16", "train.remat=full"],
    "bfloat16, fused": ["train.param_dtype=bfloat16", "train.update=fused"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizers", nargs="*", metavar="optimizer", help=f"of {', '.join(OPTIMIZERS)}; default: all")
    parser.add_argument("--gpu", default="h200", help=", ".join(TARGETS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to write")
    asked = parser.parse_args()
    if unknown := sorted({*asked.optimizers} - {*OPTIMIZERS}):
        parser.error(f"no such optimizer: {', '.join(unknown)}; there are {', '.join(OPTIMIZERS)}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(measure(Path(folder), asked.optimizers or list(OPTIMIZERS), asked.gpu, asked.layers))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    now = datetime.now(UTC).isoformat(timespec="seconds")
    report = {**environment(), "date": now, "layers": asked.layers, "tokens": TOKENS, "bytes_per_parameter": rows}
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps(report, indent=2) + "\n")
    print(table(rows))
    return 0


def measure(folder: Path, optimizers: Sequence[str], gpu: str, layers: int) -> Iterator[dict[str, Any]]:
    """One row for each optimizer and form: what a device holds, in bytes per parameter."""
    target = None if missing_wheels() else target_named(gpu)
    for optimizer in optimizers:
        config = write_config(folder, optimizer, layers)
        whole = OPTIMIZERS[optimizer].needs_whole_model
        for form, changes in FORMS.items():
            if whole and "fused" in form:
                continue
            try:
                chosen = load(config, changes, Config)
                with quiet_libraries():
                    devices = devices_for(chosen.mesh, target, 1)
                    planned = plan(chosen, devices)
            except UserError as error:
                print(f"{optimizer}, {form}: {error}", file=sys.stderr)
                continue
            yield {"optimizer": optimizer, "form": form, "device": devices[0].device_kind, **per_parameter(planned)}


def per_parameter(planned: Plan) -> dict[str, float]:
    """The parts of a plan, and what the compiled step took in seconds."""
    count, step = planned.lm.parameter_count(), planned.compiled
    parts = {"parameters": planned.parts["parameters"], "state": planned.parts["optimizer state"]}
    sizes = {**parts, "rest": step.peak_bytes - sum(parts.values()), "peak": step.peak_bytes}
    return {**{name: size / count for name, size in sizes.items()}, "compile_s": step.compile_s}


def write_config(folder: Path, optimizer: str, layers: int) -> Path:
    """A run of `optimizer` with its own defaults; its data is nowhere."""
    config = {
        "output_dir": "nowhere",
        "model": {"type": "llama", "tokenizer": "nowhere", **LLAMA_2_7B, "num_hidden_layers": layers},
        "data": {"sources": [{"path": "nowhere"}], "seq_len": TOKENS},
        "optim": {"type": optimizer, "learning_rate": 1e-3},
        "train": {"steps": 1000, "batch_size": 1, "max_grad_norm": None},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = {"parameters": "parameters", "state": "state", "rest": "gradients, activations", "peak": "peak"}
    lines = [("optimizer", "parameters in, update", *columns.values()), ("---",) * 6]
    lines += [(row["optimizer"], row["form"], *(f"{row[name]:.2f}" for name in columns)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
