"""Two processes, each with a device of its own: every row of a batch is read by the host whose device holds it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, json, itertools
import jax, numpy as np
port, process = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, int(process))
from tests.support.documents import Documents
from jaxllm import Layout, MeshConfig
from jaxllm.data.rows.loader import Loader, State
from jaxllm.train.inputs import Rows, training_loader
documents = Documents()
said = {}
for axis in ("fsdp", "context", "tensor"):
    layout = Layout.of(MeshConfig(**{"fsdp": 1, axis: 2}))
    rows = Rows(documents, documents.plan("best_fit"))
    loader = training_loader(rows, layout, micro_batches=2, micro_batch_size=2, start=State(1, 3))
    alone = Loader(*rows, micro_batches=2, micro_batch_size=2, place=lambda a: a, start=State(1, 3))
    held, right = [], True
    for ours, whole in itertools.islice(zip(loader, alone), 4):
        for name, array in ours.arrays.items():
            right &= array.shape == whole.arrays[name].shape
            right &= all((shard.data == whole.arrays[name][shard.index]).all() for shard in array.addressable_shards)
        held.append(ours.rows.tolist())
    said[axis] = {"right": bool(right), "rows": held}
print(json.dumps(said))
"""


def test_a_host_reads_the_rows_that_its_devices_hold():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(port)]
    running = [
        subprocess.Popen([*command, str(process)], env=environment, stdout=subprocess.PIPE, text=True)
        for process in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in running)
    assert first["fsdp"]["right"]
    assert second["fsdp"]["right"]
    # Of each micro-batch of two rows each host has read one; where they share sequences, both have read both.
    whole = first["tensor"]["rows"]
    for axis in ("context", "tensor"):
        assert first[axis] == second[axis] == {"right": True, "rows": whole}
    for ours, theirs, both in zip(first["fsdp"]["rows"], second["fsdp"]["rows"], whole, strict=True):
        assert [[*a, *b] for a, b in zip(ours, theirs, strict=True)] == both
