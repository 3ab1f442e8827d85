"""Training by several processes on this machine: as one process trains, saved together, stopped together."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm.checkpoint.store import Checkpoint
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.core.mesh import Layout, MeshConfig
from jaxllm.runs.config import Config
from jaxllm.train.model import model_without_weights
from jaxllm.train.program import Program
from tests.support.processes import PATIENCE_S, Ended, ends, environment, together, wait_until
from tests.support.whole_runs import read_metrics, stories, tiny_config, train, write_jsonl

LAUNCHER = Path(__file__).parents[2] / "scripts/launch/one_host.sh"
SMALL = ("train.micro_batch_size=1", "evals=[]", "data.eval_fraction=0")
# Losses of two meshes in float32: the sums are the same but for their order (DESIGN: within 1e-6; after some steps of
# AdamW parameters differ by 1e-5 of their largest value).
LOSS_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared) -> Path:
    return tiny_config(tmp_path_factory.mktemp("processes"), shared)


def command(config: Path, *overrides: str) -> list[str]:
    return ["-m", "jaxllm.train", str(config), *overrides]


def run(config: Path, count: int, *overrides: str) -> list[Ended]:
    """The command in `count` processes of two devices each."""
    with together([command(config, *overrides)] * count, cwd=config.parent, **cache(config)) as running:
        return ends(running)


def cache(config: Path) -> dict[str, str]:
    return {"JAXLLM_CACHE": str(config.parent / "cache")}


def losses(folder: Path) -> dict[int, float]:
    """By step. Each step is there once: one process writes."""
    lines = [line for line in read_metrics(folder) if "train/loss" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["train/loss"] for line in lines}


def tokens(folder: Path) -> list[int]:
    """Real tokens seen through each step, which tell the rows of each batch apart."""
    return [line["train/tokens"] for line in read_metrics(folder) if "train/tokens" in line]


def evaluations(folder: Path) -> list[float]:
    return [line["eval/held_out/loss"] for line in read_metrics(folder) if "eval/held_out/loss" in line]


@pytest.mark.parametrize("evaluated", [False, pytest.param(True, marks=pytest.mark.full)])
def test_two_processes_train_as_one_does(config, tmp_path, monkeypatch, evaluated):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    settings = [*SMALL, "train.steps=2", "checkpoint.every=1"]
    if evaluated:
        settings = ["train.micro_batch_size=1", "train.steps=5", "checkpoint.every=2", "evals.0.every=4"]
    alone = train(config, f"output_dir={tmp_path / 'alone'}", *settings, devices=4)
    launched = subprocess.run(
        [str(LAUNCHER), "2", sys.executable, *command(config, f"output_dir={tmp_path / 'both'}", *settings)],
        env=environment(JAXLLM_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert launched.returncode == 0, launched.stderr
    said = [line for line in launched.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len([line for line in said if line.startswith("devices   4 × cpu")]) == 1
    assert len([line for line in said if line.startswith("exported")]) == 1
    both = tmp_path / "both"
    for folder in (".", "checkpoints", "model", "export/hf"):
        assert sorted(p.name for p in (both / folder).iterdir()) == sorted(
            p.name for p in (alone.folder / folder).iterdir()
        )
    assert len(list((both / "tensorboard").iterdir())) == 1
    assert json.loads((both / "env.json").read_text())["devices"]["processes"] == 2
    assert losses(both) == pytest.approx(losses(alone.folder), rel=LOSS_TOLERANCE)
    assert tokens(both) == tokens(alone.folder)
    assert evaluations(both) == pytest.approx(evaluations(alone.folder), rel=LOSS_TOLERANCE)
    assert len(evaluations(both)) == (3 if evaluated else 0)
    weights = [load_file(folder / "export/hf/model.safetensors") for folder in (both, alone.folder)]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[1].items():
        np.testing.assert_allclose(weights[0][name], array, rtol=0, atol=1e-4 * np.abs(array).max())


def test_processes_with_different_configs_end_with_one_message(config):
    commands = [command(config, f"train.steps={steps}") for steps in (3, 4)]
    with together(commands, cwd=config.parent, **cache(config)) as running:
        first, second = ends(running)
    assert (first.status, second.status) == (2, 2)
    assert first.complained.count("\n") == 1
    assert "error: the processes disagree: train.steps is 3 in process 0 (pid " in first.complained
    assert (first.said, second.said, second.complained) == ("", "", "")
    assert not (config.parent / "run").exists()


ELSEWHERE = """
import os, sys
from jaxllm.train.__main__ import main
os.chdir(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.full
def test_processes_that_read_different_data_end_with_one_message(config, tmp_path, shared):
    """As on hosts whose disks hold different files under the same name."""
    write_jsonl(tmp_path / "stories.jsonl", stories(shared, 14))
    settings = [*SMALL, f"output_dir={tmp_path / 'run'}", "data.sources.0.path=stories.jsonl"]
    commands = [command(config, *settings), ["-c", ELSEWHERE, str(tmp_path), str(config), *settings]]
    with together(commands, cwd=config.parent, **cache(config)) as running:
        first, second = ends(running)
    assert (first.status, second.status) == (2, 2)
    assert "error: the processes disagree about the content of the data: it is " in first.complained
    assert "Traceback" not in first.complained + second.complained


@pytest.mark.full
def test_killed_then_stopped_then_finished_is_as_if_nothing_had_happened(config, tmp_path):
    """One process is killed: it is named, and all end. The same command goes on; SIGTERM to one process stops both
    at the same step with a complete checkpoint. The same command goes on, and ends as an undisturbed run does."""
    settings = (*SMALL, "train.steps=40", "checkpoint.every=4", "callbacks=[]")
    assert [process.status for process in run(config, 2, f"output_dir={tmp_path / 'whole'}", *settings)] == [0, 0]

    folder = tmp_path / "run"
    disturbed = command(config, f"output_dir={folder}", *settings)

    def seen(step: int) -> bool:
        metrics = folder / "metrics.jsonl"
        return metrics.exists() and f'"step": {step},' in metrics.read_text()

    with together([disturbed] * 2, cwd=config.parent, **cache(config)) as running:
        wait_until(lambda: (folder / "checkpoints/4").exists() and seen(5))
        running[1].send_signal(signal.SIGKILL)
        first, second = ends(running)
    assert second.status == -signal.SIGKILL
    assert first.status == 1
    assert f"process 1 (pid {running[1].pid} on " in first.complained
    assert "has died, and so the run ends" in first.complained
    assert "Traceback" not in first.complained

    with together([disturbed] * 2, cwd=config.parent, **cache(config)) as running:
        wait_until(lambda: seen(12))
        running[1].send_signal(signal.SIGTERM)
        first, second = ends(running)
    assert (first.status, second.status) == (128 + signal.SIGTERM,) * 2
    assert "SIGTERM to another process: the run ends after this step and saves it" in first.said
    stopped = max(losses(folder))
    assert 12 <= stopped < 40
    assert f"stopped   by SIGTERM after step {stopped}" in first.said
    saved = Checkpoint(folder / "checkpoints", stopped)
    saved.verify()
    assert saved.facts()["step"] == stopped

    assert [process.status for process in run(config, 2, f"output_dir={folder}", *settings)] == [0, 0]
    assert losses(folder) == losses(tmp_path / "whole")  # the same mesh: the same bits
    assert tokens(folder) == tokens(tmp_path / "whole")


@pytest.mark.full
def test_what_four_processes_saved_two_and_one_go_on_with(config, tmp_path, monkeypatch):
    """From a pipeline, whose stages are in different processes, onto other meshes. The data go on where they were, and
    the losses are those of the four."""
    settings = (*SMALL, "train.steps=6", "checkpoint.every=3", "callbacks=[]")
    four = tmp_path / "four"
    ended = run(config, 4, f"output_dir={four}", *settings, "mesh.pipeline=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert [process.status for process in ended] == [0] * 4, ended[0].complained
    assert len(list((four / "checkpoints/3/state").glob("ocdbt.process_*"))) == 4  # each wrote its own

    def half(name: str) -> Path:
        """The run as it was after step 3."""
        folder = shutil.copytree(four, tmp_path / name)
        shutil.rmtree(folder / "checkpoints/6")
        shutil.rmtree(folder / "export")
        (folder / "checkpoints/latest").write_text("3\n")
        return folder

    two = half("two")
    ended = run(config, 2, f"output_dir={two}", *settings, "mesh.fsdp=1", "mesh.context=4")
    assert [process.status for process in ended] == [0, 0], ended[0].complained
    one = half("one")
    monkeypatch.setenv("JAXLLM_CACHE", str(config.parent / "cache"))
    train(config, f"output_dir={one}", *settings, "train.micro_batch_size=8")
    for folder in (two, one):
        assert losses(folder) == pytest.approx(losses(four), rel=LOSS_TOLERANCE)
        assert tokens(folder) == tokens(four)


RESTORED = """
import hashlib, json, sys
import jax, numpy as np
from pathlib import Path
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.checkpoint.store import Checkpoint
from jaxllm.checkpoint.writer import CheckpointWriter
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.processes.distributed import joined
from jaxllm.processes.launch import find_place
from jaxllm.core.mesh import Layout
from jaxllm.processes.watch import DistributedConfig
from jaxllm.runs.config import Config
from jaxllm.train.model import model_without_weights
from jaxllm.train.program import Program
what, folder, path, *overrides = sys.argv[1:]
config = load(path, overrides, Config)
place = find_place()
with joined(place, {}, DistributedConfig()):
    lm = model_without_weights(config, Layout.of(config.mesh))
    program = Program.of(config, lm, 10)
    if what == "save":
        def drawn(shape):
            noise = np.random.default_rng(len(shape.shape)).standard_normal(shape.shape).astype(shape.dtype)
            return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: noise[index])
        state = jax.tree.map(drawn, program.state)
        writer = CheckpointWriter(Path(folder), CheckpointConfig())
        writer.save(3, state, {"step": 3})
        writer.close()
    else:
        state = Checkpoint(Path(folder), 3).restore(program.state)
    whole = jax.tree.map(lambda leaf: jax.device_put(leaf, lm.layout.replicated).addressable_data(0), state)
    digests = {k: hashlib.sha256(np.asarray(v).tobytes()).hexdigest() for k, v in tree.flatten(whole).items()}
    if place.process_id == 0:
        print(json.dumps(digests))
"""


@pytest.mark.full
def test_the_state_keeps_its_bits(config, tmp_path):
    """Parameters and moments: as four processes held them, two processes hold them on another mesh, and so does one."""

    def state(count: int, what: str, *mesh: str) -> dict[str, str]:
        arguments = ["-c", RESTORED, what, str(tmp_path / "checkpoints"), str(config), *mesh]
        with together([arguments] * count, cwd=config.parent, **cache(config)) as running:
            ended = ends(running)
        assert [process.status for process in ended] == [0] * count, ended[0].complained
        return json.loads(ended[0].said.splitlines()[-1])

    saved = state(4, "save", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert len(saved) > 20
    assert len(set(saved.values())) > 3
    assert state(2, "restore", "mesh.fsdp=4") == saved

    alone = load(config, ["mesh.fsdp=1"], Config)
    layout = Layout.of(MeshConfig(fsdp=1), jax.devices()[:1])
    program = Program.of(alone, model_without_weights(alone, layout), 10)
    restored = Checkpoint(tmp_path / "checkpoints", 3).restore(program.state)

    digests = {
        path: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in tree.flatten(restored).items()
    }
    assert digests == saved


HANGS = """
import sys, time
import jaxllm.train.inputs as inputs
from jaxllm.train.__main__ import main
before = inputs._place
def a_disk_that_does_not_answer(*arguments, placed=[]):
    placed.append(1)
    if len(placed) > 5:
        time.sleep(600)
    return before(*arguments)
inputs._place = a_disk_that_does_not_answer
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_a_process_whose_data_do_not_come_is_named(config, tmp_path):
    settings = [*SMALL, f"output_dir={tmp_path / 'run'}", "train.steps=40", "callbacks=[]"]
    settings += ["distributed.hang_after=5"]
    commands = [command(config, *settings), ["-c", HANGS, str(config), *settings]]
    with together(commands, cwd=config.parent, **cache(config)) as running:
        first, second = ends(running)
    assert (first.status, second.status) == (1, 1)
    assert f"process 1 (pid {running[1].pid} on " in first.complained
    assert "has not got on in 5 s (distributed.hang_after), and the others wait for it" in first.complained
    assert "in a_disk_that_does_not_answer" in second.complained
