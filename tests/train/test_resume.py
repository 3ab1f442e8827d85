"""A run that was killed, interrupted or moved ends as one that never stopped."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from whole_runs import read_metrics, start, tiny_config, train

from jaxllm.checkpoint.store import CheckpointStore
from jaxllm.convert.load import open_model
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.core.mesh import Layout, MeshConfig
from jaxllm.optim.build import build
from jaxllm.train.config import Config
from jaxllm.train.state import abstract_state

STEPS = 20
# No mesh divides it: on (data 2, fsdp 2, tensor 2) the vocabulary is padded to 516.
CHANGES = (f"train.steps={STEPS}", "model.vocab_size=513")
MOMENTS = random.Random(0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, shared):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.setenv("JAXLLM_CACHE", str(folder / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield tiny_config(folder, shared)


@pytest.fixture(scope="module")
def never_stopped(workplace) -> Path:
    folder = workplace.parent / "never-stopped"
    process = start(workplace, *CHANGES, f"output_dir={folder}")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return folder


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Returns when the run has logged `step` and has a complete checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        metrics = folder / "metrics.jsonl"
        logged = metrics.exists() and f'{{"step": {step}, "train/loss"' in metrics.read_text()
        if logged and (folder / "checkpoints/latest").exists():
            return
        time.sleep(0.002)
    said = process.communicate()[0]
    pytest.fail(f"the run never came to step {step}: {said}")


def saved_state(folder: Path, step: int, layout: Layout | None = None) -> dict[str, Any]:
    """`{path: array}` of a checkpoint, restored onto `layout`."""
    config = load(folder / "config.resolved.yaml", [], Config)
    lm = open_model(folder, layout or Layout.single()).lm
    everything = jax.tree.map(lambda _: True, lm.abstract())
    tx, _ = build(config.optim, STEPS)
    shapes = abstract_state(lm.abstract(), everything, tx, lm.layout)
    return tree.flatten(CheckpointStore(folder / "checkpoints", read_only=True).restore(step, shapes))


def assert_same_run(folder: Path, other: Path) -> None:
    """The same bits in parameters, optimizer state and export, and each step logged once with the same values."""
    ours, theirs = saved_state(folder, STEPS), saved_state(other, STEPS)
    assert ours.keys() == theirs.keys()
    assert any(path.endswith("nu/head/kernel") for path in ours)
    for path, leaf in ours.items():
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path
    exports = [(run / "export/hf/model.safetensors").read_bytes() for run in (folder, other)]
    assert exports[0] == exports[1]
    assert logged(folder) == logged(other)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every line of the metrics, without what the clock says; floats to the last bit."""
    return [
        {
            name: value.hex() if isinstance(value, float) else value
            for name, value in line.items()
            if not name.startswith(("perf/", "mem/"))
        }
        for line in read_metrics(folder)
    ]


@pytest.mark.optimized
def test_killed_then_interrupted(workplace, never_stopped):
    folder = workplace.parent / "stopped"
    command = (workplace, *CHANGES, f"output_dir={folder}")
    process = start(*command)
    # In the second epoch, between two checkpoints.
    wait_for_step(process, folder, MOMENTS.randint(5, 7))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "export").exists()

    process = start(*command)
    wait_for_step(process, folder, 13)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "resuming" in said
    assert "Traceback" not in said
    newest = (folder / "checkpoints/latest").read_text().strip()
    assert 13 <= int(newest) < STEPS
    assert f"stopped   by SIGINT after step {newest}; it is saved in {folder}" in said
    assert "the same command goes on from there" in said

    process = start(*command)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"from {folder}/checkpoints/{newest}, {STEPS - int(newest)} of {STEPS} steps to go" in said
    assert_same_run(folder, never_stopped)


def test_one_process_that_is_never_stopped_logs_each_step_once(never_stopped):
    lines = logged(never_stopped)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/held_out/loss" in line] == [0, 6, 12, 18, 20]


def test_killed_before_the_first_checkpoint(workplace, never_stopped):
    """The run begins anew, and what the killed one logged is not there twice."""
    folder = workplace.parent / "anew"
    shutil.copytree(never_stopped, folder, ignore=shutil.ignore_patterns("[0-9]*", "latest", "export"))
    ran = train(workplace, *CHANGES, "train.steps=2", f"output_dir={folder}")
    assert "resuming" not in ran.said
    assert [line["step"] for line in ran.metrics()] == [0, 1, 2, 2]


def test_a_checkpoint_on_another_mesh_is_the_same_state(never_stopped):
    mesh = Layout.of(MeshConfig(data=2, fsdp=2, tensor=2))
    moved, here = saved_state(never_stopped, 16, mesh), saved_state(never_stopped, 16)
    assert moved["params/head/kernel"].shape == (32, 516)
    assert len(moved["params/head/kernel"].sharding.device_set) == 8
    for path, leaf in moved.items():
        wanted = np.asarray(here[path])
        real = np.asarray(leaf)[tuple(slice(size) for size in wanted.shape)]
        assert real.tobytes() == wanted.tobytes(), path
        assert np.count_nonzero(leaf) == np.count_nonzero(wanted), path  # padding is zero


def test_a_run_goes_on_on_another_mesh(workplace, never_stopped):
    folder = workplace.parent / "moved"
    shutil.copytree(never_stopped, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    mesh = ("mesh={data: 2, fsdp: 2, tensor: 2}", "train.micro_batch_size=2")
    ran = train(workplace, *CHANGES, f"output_dir={folder}", *mesh, devices=8)
    assert ran.status == 0
    ours, theirs = (
        {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}
        for run in (folder, never_stopped)
    )
    assert list(ours) == list(range(1, STEPS + 1))
    # The same parameters and batch: rounding alone. After an update, rounding that AdamW's division has amplified.
    assert ours[17] == pytest.approx(theirs[17], rel=1e-6)
    assert ours[20] == pytest.approx(theirs[20], rel=1e-4)


def test_a_new_folder_goes_on_from_a_named_checkpoint(workplace, never_stopped):
    folder, before = workplace.parent / "continued", os.listdir(never_stopped)
    overrides = (
        *CHANGES,
        f"output_dir={folder}",
        f"checkpoint.resume={never_stopped}/checkpoints/16",
        "optim.learning_rate=1e-3",
    )
    ran = train(workplace, *overrides)
    assert ran.status == 0
    lines = {line["step"]: line for line in ran.metrics() if "train/loss" in line}
    theirs = {line["step"]: line for line in read_metrics(never_stopped) if "train/loss" in line}
    assert list(lines) == [17, 18, 19, 20]
    assert lines[17]["train/loss"] == pytest.approx(theirs[17]["train/loss"], rel=1e-6)
    assert lines[20]["train/tokens"] == theirs[20]["train/tokens"]
    assert lines[17]["train/learning_rate"] == pytest.approx(theirs[17]["train/learning_rate"] / 10, rel=1e-6)
    assert os.listdir(never_stopped) == before
    # The same command again finds its own work, which is done.
    again = train(workplace, *overrides)
    assert again.status == 0
    assert f"from {folder}/checkpoints/20, 0 of 20 steps to go" in again.said
    assert len(again.metrics()) == len(ran.metrics())
