"""A run that was killed, interrupted or moved ends as one that never stopped."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxllm.checkpoint.store import Checkpoint
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.core.mesh import Layout, MeshConfig
from jaxllm.processes.interrupt import Interrupt
from jaxllm.runs.config import Config
from jaxllm.runs.open import open_model
from jaxllm.train.model import model_without_weights
from jaxllm.train.program import Program
from jaxllm.train.run import run
from tests.support.whole_runs import read_metrics, start, stories, tiny_config, train, write_jsonl

STEPS = 40
# No mesh divides it: on (data 2, fsdp 2, tensor 2) the vocabulary is padded to 516.
CHANGES = (f"train.steps={STEPS}", "model.vocab_size=513", "checkpoint.keep_every=20")
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
    program = Program.of(config, model_without_weights(config, layout or Layout.single()), STEPS)
    checkpoint = Checkpoint(folder / "checkpoints", step)
    return tree.flatten(checkpoint.restore(program.state, paddable=program.lm.paddable))


def assert_same_run(folder: Path, other: Path) -> None:
    """The same bits in parameters, optimizer state and export, and each step logged once with the same values."""
    ours, theirs = saved_state(folder, STEPS), saved_state(other, STEPS)
    assert ours.keys() == theirs.keys()
    assert any("/nu/" in path for path in ours)
    for path, leaf in ours.items():
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path
    exports = [{file.name: file.read_bytes() for file in run.glob("export/*/*.safetensors")} for run in (folder, other)]
    assert exports[0]
    assert exports[0] == exports[1]
    assert logged(folder) == logged(other)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every line of the metrics, without what the clock says; floats to the last bit."""
    lines = [
        {
            name: value.hex() if isinstance(value, float) else value
            for name, value in line.items()
            if not name.startswith(("perf/", "mem/", "ckpt/"))
        }
        for line in read_metrics(folder)
    ]
    return [line for line in lines if len(line) > 1]  # a line of `ckpt/` has nothing but its step


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
    assert [line["step"] for line in lines if "eval/held_out/loss" in line] == [*range(0, STEPS, 6), STEPS]


def test_killed_before_the_first_checkpoint(workplace, never_stopped):
    """The run begins anew, and what the killed one logged is not there twice."""
    folder = workplace.parent / "anew"
    shutil.copytree(never_stopped, folder, ignore=shutil.ignore_patterns("[0-9]*", "latest", "export"))
    ran = train(workplace, *CHANGES, "train.steps=2", f"output_dir={folder}")
    assert "resuming" not in ran.said
    assert [line["step"] for line in logged(folder)] == [0, 1, 2, 2]


def test_a_checkpoint_on_another_mesh_is_the_same_state(never_stopped):
    mesh = Layout.of(MeshConfig(data=2, fsdp=2, tensor=2))
    moved, here = saved_state(never_stopped, 20, mesh), saved_state(never_stopped, 20)
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
    for newer in (36, 40):
        shutil.rmtree(folder / "checkpoints" / str(newer))
    mesh = ("mesh={data: 2, fsdp: 2, tensor: 2}", "train.micro_batch_size=2")
    ran = train(workplace, *CHANGES, f"output_dir={folder}", *mesh, devices=8)
    assert ran.status == 0
    ours, theirs = (
        {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}
        for run in (folder, never_stopped)
    )
    assert list(ours) == list(range(1, STEPS + 1))
    # Rounding alone, which AdamW's division amplifies from step to step: 2e-7 at most, measured.
    assert [ours[step] for step in range(21, 41)] == pytest.approx([theirs[step] for step in range(21, 41)], rel=1e-6)
    changed = ("mesh.data (there: 1, now: 2)", "train.micro_batch_size (there: 4, now: 2)")
    assert all(change in ran.said.partition("changed, and harmless: ")[2].partition("\n")[0] for change in changed)


def test_a_new_folder_goes_on_from_a_named_checkpoint(workplace, never_stopped):
    folder, before = workplace.parent / "continued", os.listdir(never_stopped)
    overrides = (
        *CHANGES,
        f"output_dir={folder}",
        f"checkpoint.resume={never_stopped}/checkpoints/20",
        "optim.learning_rate=1e-3",
        "evals.0.every=4",
        "checkpoint.best=eval/held_out/loss",
        "checkpoint.best_mode=max",  # so that it is none of the newest
    )
    ran = train(workplace, *overrides)
    assert ran.status == 0
    lines = {line["step"]: line for line in ran.metrics() if "train/loss" in line}
    theirs = {line["step"]: line for line in read_metrics(never_stopped) if "train/loss" in line}
    assert list(lines) == list(range(21, STEPS + 1))
    assert lines[21]["train/loss"] == pytest.approx(theirs[21]["train/loss"], rel=1e-6)
    assert lines[STEPS]["train/tokens"] == theirs[STEPS]["train/tokens"]
    assert lines[21]["train/learning_rate"] == pytest.approx(theirs[21]["train/learning_rate"] / 10, rel=1e-6)
    assert "optim.learning_rate (there: 0.01, now: 0.001)" in ran.said
    assert os.listdir(never_stopped) == before
    losses = {line["step"]: line["eval/held_out/loss"] for line in ran.metrics() if "eval/held_out/loss" in line}
    assert list(losses) == list(range(20, STEPS + 1, 4))
    best = max(range(24, STEPS + 1, 4), key=lambda step: losses[step])
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {str(best), "36", "40", "best", "latest"}
    chosen, wanted = (open_model(folder / "checkpoints" / name, Layout.single()).load() for name in ("best", str(best)))
    jax.tree.map(np.testing.assert_array_equal, chosen, wanted)
    # The same command again finds its own work, which is done.
    again = train(workplace, *overrides)
    assert again.status == 0
    assert f"from {folder}/checkpoints/{STEPS}, 0 of {STEPS} steps to go" in again.said
    assert len(again.metrics()) == len(ran.metrics())


class ToldToStop(Interrupt):
    """A signal that arrives when the run has logged `step`: in the midst of what follows."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(Console(file=io.StringIO()))
        self._metrics, self._wanted = folder / "metrics.jsonl", f'{{"step": {step}, "train/loss"'

    def stopped(self) -> bool:
        if self._metrics.exists() and self._wanted in self._metrics.read_text():
            self.signal = signal.SIGTERM
        return super().stopped()


def read_logged(folder: Path) -> dict[tuple[int, str], float]:
    """The losses, held out or not."""
    lines = read_metrics(folder)
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.endswith("/loss")}


def test_interrupted_in_an_evaluation(workplace, never_stopped):
    """It is broken off, the step is saved, and the evaluation is made up for; so too at the very last step."""
    folder = workplace.parent / "evaluating"
    overrides = (*CHANGES, f"output_dir={folder}")
    for step in (18, STEPS):
        console = Console(file=io.StringIO(), width=200)
        status = run(load(workplace, overrides, Config), console, jax.devices()[:1], ToldToStop(folder, step))
        assert status == 128 + signal.SIGTERM
        assert f"stopped   by SIGTERM after step {step}; it is saved in" in console.file.getvalue()
        assert (folder / "checkpoints/latest").read_text() == f"{step}\n"
        assert "eval/held_out/loss" not in read_metrics(folder)[-1]
        assert not (folder / "export").exists()
    assert train(workplace, *overrides).status == 0
    ours, theirs = read_logged(folder), read_logged(never_stopped)
    assert list(ours) == list(theirs)
    # This process has eight devices, and so other threads than that one: another order of sums.
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)


@pytest.mark.full
@pytest.mark.optimized
def test_killed_at_five_moments(workplace, shared):
    """While it starts, twice in its first epoch, in its second, and inside a save."""
    data = write_jsonl(workplace.parent / "many.jsonl", stories(shared, 60))
    command = (workplace, *CHANGES, f"data.sources.0.path={data}", "checkpoint.every=2")
    whole, killed = workplace.parent / "whole", workplace.parent / "killed"
    process = start(*command, f"output_dir={whole}")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    epoch = epoch_steps(whole)
    assert 2 * epoch < STEPS - 4

    def logs(step: int) -> Callable[[], bool]:
        return lambda: (killed / "metrics.jsonl").exists() and last_step(killed) >= step

    def is_saving() -> bool:
        return logs(2 * epoch)() and any((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    first = MOMENTS.randint(2, epoch // 2 - 2)
    moments = [
        (lambda: (killed / "run.lock").exists(), range(1)),
        (logs(first), range(1, epoch)),
        (logs(first + epoch // 4), range(1, epoch)),
        (logs(epoch + MOMENTS.randint(1, epoch // 2)), range(epoch, 2 * epoch)),
        (is_saving, range(2 * epoch, STEPS)),
    ]
    for moment, steps in moments:
        process = start(*command, f"output_dir={killed}")
        kill_when(moment, process)
        assert process.returncode == -signal.SIGKILL
        assert (last_step(killed) if (killed / "metrics.jsonl").exists() else 0) in steps
    assert list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))  # the last kill was inside a save
    process = start(*command, f"output_dir={killed}")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert_same_run(killed, whole)
    assert not list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


LORA = "type: lora, r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: all-linear"
METHODS = {
    "lora, layers drawn": [f"peft={{{LORA}, lisa: {{active_layers: 1, interval: 5, state: keep}}}}"],
    "lisa": ["peft={type: lisa, active_layers: 1, interval: 5}"],
}


@pytest.mark.full
@pytest.mark.optimized
@pytest.mark.parametrize("method", METHODS)
def test_killed_while_a_part_trains(workplace, never_stopped, method):
    """What the method adds, its dropout and its draws go on from the middle of an interval as if nothing had been."""
    model = f"model={{path: {never_stopped / 'export/hf'}}}"
    command = (workplace, f"train.steps={STEPS}", model, *METHODS[method])
    whole, killed = (workplace.parent / f"{method} {name}" for name in ("whole", "killed"))
    process = start(*command, f"output_dir={whole}")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    process = start(*command, f"output_dir={killed}")
    kill_when(lambda: (killed / "checkpoints/latest").exists() and last_step(killed) > 7, process)
    assert last_step(killed) < STEPS
    process = start(*command, f"output_dir={killed}")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "resuming" in said
    newest = int(said.partition(f"{killed}/checkpoints/")[2].partition(",")[0])
    assert newest % 5, "it goes on within an interval"
    assert_same_run(killed, whole)


def kill_when(moment: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Kills the process while `moment` holds: it is held still while that is looked at."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if moment():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if moment():
                process.kill()
                process.communicate()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    pytest.fail(f"the moment never came: {process.communicate()[0]}")


def last_step(folder: Path) -> int:
    """The newest step that the run has logged, from whole lines."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return max((json.loads(line)["step"] for line in lines), default=0)


def epoch_steps(folder: Path) -> int:
    """Steps in an epoch, from the state of the data at the end of the run."""
    facts = Checkpoint(folder / "checkpoints", STEPS).facts()
    batch = load(folder / "config.resolved.yaml", [], Config).train.batch_size
    return (STEPS - facts["position"] // batch) // facts["epoch"]
