"""Two processes that share one model: each reads its half alone, and one writes."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.hf.config import write_config
from jaxllm.hf.weights import weight_table
from jaxllm.models import FAMILIES
from jaxllm.models.lm import LM
from tests.support.families import draw_config, small_lm, write_checkpoint

GIB = 2**30

PROGRAM = """
import sys, json, jax
port, process, source, target = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, int(process))
from jaxllm import Layout, MeshConfig, load_hf, save_hf
lm, params = load_hf(source, layout=Layout.of(MeshConfig(fsdp=2)))
if target:
    save_hf(lm, params, target)
jax.block_until_ready(params)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
shards = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
print(json.dumps({"peak": int(status["VmHWM"].split()[0]) * 1024, "shards": shards}))
"""


def two_processes(source: Path, target: Path | str = "") -> list[dict[str, int]]:
    """Loads `source` over two processes, and saves it to `target`; what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(process), str(source), str(target)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = []
    for process in running:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        outputs.append(json.loads(out.splitlines()[-1]))
    return outputs


def sparse_checkpoint(folder: Path, size: dict[str, int]) -> LM:
    """A checkpoint whose weights are a hole in the file: gibibytes that take no disk."""
    family = FAMILIES["llama"]
    config = family.config(**size)
    lm = small_lm(config)
    header, end = {}, 0
    for entry in weight_table(lm):
        start, end = end, end + 4 * math.prod(entry.shape)
        header[entry.names[0]] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(write_config(family, config)))
    return lm


@pytest.mark.full
def test_a_process_holds_its_shards_and_one_tensor(tmp_path):
    """Peak host memory ≤ the process's shards + the largest tensor + 1 GiB, which holding it all would break."""
    lm = sparse_checkpoint(
        tmp_path,
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 10,
            "num_attention_heads": 16,
        },
    )
    whole = 4 * lm.parameter_count()
    largest = 4 * 32000 * 2048
    for process in two_processes(tmp_path):
        bound = process["shards"] + largest + GIB
        assert process["shards"] < 0.51 * whole
        assert process["peak"] <= bound, f"{process['peak'] / GIB:.2f} GiB > {bound / GIB:.2f} GiB"
        assert whole > bound, "the test is too small to tell"


def test_two_processes_write_what_they_read(tmp_path):
    config = draw_config("llama", 0, hidden_size=32, intermediate_size=64, vocab_size=61)
    source = write_checkpoint(tmp_path / "source", config)
    two_processes(source, tmp_path / "target")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
