"""Plans for GPUs, in a process of their own: tests run without CUDA's plugin."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

needs_compiler = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's compiler is for Linux alone")

# Shapes of known models: of Llama 3 8B, and of a TinyLlama with 16 layers.
LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
LLAMA_1B = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16)
HEADS = {"8B": dict(num_attention_heads=32, num_key_value_heads=8), "1B": dict(num_attention_heads=16)}

PROGRAM = """
import json, sys
from jaxllm.core.config import load
from jaxllm.plan.plan import devices_for, plan
from jaxllm.plan.targets import target_named
from jaxllm.runs.config import Config

for changes in json.loads(sys.argv[2]):
    config = load(sys.argv[1], changes, Config)
    planned = plan(config, devices_for(config.mesh, target_named("h100"), None))
    step = planned.compiled
    sizes = [step.argument_bytes, step.temp_bytes, step.peak_bytes, step.in_place_bytes]
    print(json.dumps([dict(planned.parts), *sizes, planned.attention.form]))
"""


class GpuPlan(NamedTuple):
    """What `plan` says for an H100, in bytes."""

    parts: dict[str, int]
    argument: int
    temp: int
    peak: int
    in_place: int
    attention: str


def config_of(folder: Path, model: dict[str, Any], **train: Any) -> Path:
    """Writes the config of a new Llama; its data and tokenizer are nowhere."""
    config = {
        "output_dir": str(folder / "run"),
        "model": {"type": "llama", "tokenizer": "nowhere", **model},
        "data": {"sources": [{"path": "nowhere"}], "seq_len": 2048},
        "optim": {"type": "lomo", "learning_rate": 1e-2},
        "train": {"epochs": 1, "batch_size": 1, "update": "fused", "param_dtype": "bfloat16", **train},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def gpu_plans(config: Path, *changes: Sequence[str]) -> list[GpuPlan]:
    """The plan of `config` under each list of changes."""
    command = [sys.executable, "-c", PROGRAM, str(config), json.dumps(changes)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [GpuPlan(*json.loads(line)) for line in done.stdout.splitlines()]
