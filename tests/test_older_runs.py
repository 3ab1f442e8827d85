"""Runs, adapters and token stores that an earlier version wrote (see support/written_by_version_1/README.md)."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm.convert.__main__ import main as convert
from jaxllm.generate.__main__ import main as generate
from tests.support.whole_runs import read_metrics, train

WRITTEN = Path(__file__).parent / "support" / "written_by_version_1"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as the working directory, with its cache in use and every file of another time."""
    copy = shutil.copytree(WRITTEN, tmp_path / "written")
    for path in copy.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("JAXLLM_CACHE", str(copy / "cache"))
    return copy


def stores() -> dict[str, tuple[int, int]]:
    """The folders and files of the token stores, each with its number on the disk and its time."""
    found = ((path, path.stat()) for path in Path("cache/tokens").rglob("*"))
    return {str(path): (status.st_ino, status.st_mtime_ns) for path, status in found}


def check_same(ours: Path, theirs: Path, tolerance: float = 0.0) -> None:
    tensors, wanted = load_file(ours), load_file(theirs)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("name", "exported"), [("run", "hf/model"), ("lora_run", "adapter/adapter_model")])
@pytest.mark.usefixtures("written")
def test_a_run_goes_on_as_it_would_have_then(name: str, exported: str) -> None:
    tokenized = stores()

    ran = train(Path(name, "config.resolved.yaml"))

    assert ran.status == 0
    assert f"{name}/checkpoints/3, 3 of 6 steps to go" in ran.said
    notes = [line for line in ran.said.splitlines() if line.startswith("note ")]
    assert len(notes) == 1, notes  # nothing is changed, unsealed or damaged
    assert "lines dropped of steps after 3" in notes[0]
    assert stores() == tokenized
    metrics, wanted = ran.metrics(), read_metrics(WRITTEN / name)
    for kind in ("train/loss", "eval/held_out/loss"):
        losses, then = ({line["step"]: line[kind] for line in lines if kind in line} for lines in (metrics, wanted))
        assert losses == pytest.approx(then, rel=1e-5)
        assert max(losses) == 6
    assert Path(name, "export", f"{exported}.safetensors").is_file()


@pytest.mark.usefixtures("written")
def test_a_checkpoint_has_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["to-hf", "run", "out"]) == 0
    check_same(Path("out/model.safetensors"), WRITTEN / "model/model.safetensors")
    assert generate(["run", "--prompt", "the cat ", "--max-new-tokens", "4"]) == 0
    assert "the cat " in capsys.readouterr().out


@pytest.mark.usefixtures("written")
def test_an_adapter_is_merged_into_the_same_model() -> None:
    assert convert(["merge", "model", "adapter", "out"]) == 0
    check_same(Path("out/model.safetensors"), WRITTEN / "merged.safetensors", tolerance=1e-6)
