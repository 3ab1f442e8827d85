"""Whole runs of a tiny model on real text, in this process or in one of their own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from rich.console import Console

from jaxllm.core.config import load
from jaxllm.runs.config import Config
from jaxllm.train.run import run


def stories(shared: Path, count: int, first: int = 0) -> list[dict[str, str]]:
    """Records `{text}`."""
    lines = (shared / "data/tinystories/valid.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[first : first + count]]


def sums(shared: Path, count: int, first: int = 0) -> list[dict[str, str]]:
    """Records `{question, answer}` of school maths, short ones."""
    lines = (shared / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    short = [line for line in lines if len(line) < 300]
    return [json.loads(line) for line in short[first : first + count]]


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@contextmanager
def workplace(folder: Path, shared: Path) -> Iterator[Path]:
    """The config of `tiny_config`, with a token cache of its own and cheap compilation; for fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        jax.config.update("jax_disable_most_optimizations", True)
        patch.setenv("JAXLLM_CACHE", str(folder / "cache"))
        yield tiny_config(folder, shared)


def tiny_config(folder: Path, shared: Path) -> Path:
    """Writes text and the config of a small Llama from scratch into `folder`; returns the config's file.

    Two micro-batches a step, a fifth of the stories held out, two and a half epochs in 12 steps.
    """
    data = write_jsonl(folder / "stories.jsonl", stories(shared, 15))
    config = {
        "output_dir": str(folder / "run"),
        "model": {
            "type": "llama",
            "tokenizer": str(shared / "models/stories260K"),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
        "data": {"sources": [{"path": str(data)}], "seq_len": 128, "eval_fraction": 0.2},
        "optim": {
            "type": "adamw",
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "schedule": {"type": "cosine", "warmup": 2},
        },
        "train": {"steps": 12, "batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every": 4, "keep": 2},
        "evals": [{"name": "held_out", "every": 6}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ran:
    """A run that ended. said: what it wrote on the console."""

    status: int
    said: str
    folder: Path
    config: Config

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(path: Path, *overrides: str, devices: int = 1) -> Ran:
    """A run in this process on the first `devices` simulated devices."""
    config = load(path, overrides, Config)
    console = Console(file=io.StringIO(), width=200)
    status = run(config, console, jax.devices()[:devices])
    assert isinstance(console.file, io.StringIO)
    return Ran(status, console.file.getvalue(), Path(config.output_dir), config)


def start(path: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with one device; its output is one stream."""
    command = [sys.executable, "-u", "-m", "jaxllm.train", str(path), *overrides]
    environment = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200", **environment}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=path.parent
    )
