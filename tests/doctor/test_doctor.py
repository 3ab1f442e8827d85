"""What the doctor says, and how it ends."""

import io
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.doctor import examine as doctor
from jaxllm.doctor.examine import Sight, examine
from jaxllm.runs.config import Config
from tests.support.processes import PATIENCE_S, ends, environment, together
from tests.support.whole_runs import tiny_config


def sight(**changes) -> Sight:
    healthy = dict(process=0, pid=1, host="node1", platform="gpu", kind="NVIDIA H200", devices=8, device_gib=129.5)
    rest = dict(gpus=8, driver="570.124", host_gib=1000.0, free_gib={"cache": 100.0, "output_dir": 100.0})
    return Sight(**{**healthy, **rest, **changes})  # pyright: ignore[reportArgumentType]


def diagnosis(*sights: Sight) -> str | None:
    return next(doctor._problems(sights), None)  # pyright: ignore[reportPrivateUsage]


def test_one_process_with_a_config(tmp_path, shared, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "ARRAY_BYTES", 2**12)
    console = Console(file=io.StringIO(), width=200)
    config = load(tiny_config(tmp_path, shared), ["train.micro_batch_size=1", "mesh.tensor=2"], Config)
    examine(config, None, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert f"jax {jax.__version__}" in said
    assert "processes 1, a run of its own" in said
    assert "8 × cpu: pipeline 1 × data 1 × fsdp 4 × context 1 × tensor 2" in said
    assert "2 × 4 a step, of which process 0 reads 0 to 3 of each 4" in said
    assert "8 devices added up 0 MiB each in " in said
    assert said.rstrip().endswith("right")


def test_a_mesh_that_does_not_fit(tmp_path, shared):
    config = load(tiny_config(tmp_path, shared), ["mesh.tensor=3"], Config)
    with pytest.raises(UserError, match="does not fit the 8 device"):
        examine(config, None, Console(quiet=True))


def test_the_sum_is_of_all_devices(monkeypatch):
    monkeypatch.setattr(doctor, "ARRAY_BYTES", 2**12)
    total, seconds = doctor.add_up()
    assert total == jax.device_count()
    assert seconds > 0


@pytest.mark.parametrize(
    ("sights", "message"),
    [
        ([sight(), sight(process=1, host="node2")], None),
        ([sight(platform="cpu", kind="cpu", devices=1)], "has 8 NVIDIA GPUs (driver 570.124) and JAX sees none of"),
        ([sight(), sight(process=1, host="node2", devices=4)], "process 1 on node2 has 4 × NVIDIA H200, and process 0"),
        ([sight(), sight(process=1, host="node2", kind="NVIDIA H100")], "process 1 on node2 has 8 × NVIDIA H100"),
        ([sight(devices=1), sight(process=1, devices=1)], "the processes on node1 use 2 of its 8 GPUs"),
        ([sight(free_gib={"cache": None})], "cannot write to the folder of the cache; set JAXLLM_CACHE"),
        ([sight(free_gib={"cache": 1.0, "output_dir": None})], "choose another output_dir"),
    ],
)
def test_what_is_wrong_is_found(sights, message):
    found = diagnosis(*sights)
    assert (found is None) if message is None else (found is not None and message in found)


@pytest.mark.full
def test_two_processes(tmp_path, shared):
    config = str(tiny_config(tmp_path, shared))
    arguments = ["-m", "jaxllm.doctor", config, "train.micro_batch_size=1"]
    with together([arguments] * 2) as running:
        first, second = ends(running)
    assert (first.status, second.status) == (0, 0), first.complained
    assert "processes 2, as JAX_COORDINATOR_ADDRESS says; the coordinator is 127.0.0.1:" in first.said
    assert f"│ {running[1].pid} " in first.said
    assert "2 × 4 a step, of which process 0 reads 0 to 1 of each 4" in first.said
    assert "4 devices added up 32 MiB each in " in first.said
    assert "processes 2" not in second.said

    with together([arguments, [*arguments, "seed=1"]]) as running:
        first, second = ends(running)
    assert (first.status, second.status) == (2, 2)
    assert "error: the processes disagree: seed is 0 in process 0 (pid " in first.complained


def test_an_unknown_config_is_one_message(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "jaxllm.doctor", str(tmp_path / "nope.yaml")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
