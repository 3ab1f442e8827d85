"""What is prepared ahead is what a run reads: the command tokenizes all of it, and the run nothing more."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.data.rows import store
from jaxllm.prepare.__main__ import main
from jaxllm.runs.config import Config
from jaxllm.train.inputs import Inputs, read_inputs
from jaxllm.train.model import open_tokenizer
from tests.support.hub_cache import COMMIT, add_repository
from tests.support.whole_runs import stories, train, workplace, write_jsonl


@pytest.fixture
def config(tmp_path, shared) -> Iterator[Path]:
    """Of a run of one step, with a held-out share and a held-out file."""
    with workplace(tmp_path, shared) as path:
        values = yaml.safe_load(path.read_text())
        other = write_jsonl(tmp_path / "other.jsonl", stories(shared, 4, first=15))
        values["evals"] = [{"name": "share", "every": 9}, {"name": "file", "path": str(other), "every": 9}]
        values["train"]["steps"], values["optim"]["schedule"]["warmup"] = 1, 0
        path.write_text(yaml.safe_dump(values))
        yield path


def tokenized(cache: Path) -> set[str]:
    return {folder.name for folder in (cache / "tokens").iterdir()}


def test_a_run_tokenizes_nothing_more(config, capsys, monkeypatch):
    assert main([str(config)]) == 0
    said = capsys.readouterr().out
    cache = config.parent / "cache"
    assert len(tokenized(cache)) == 2
    assert all(name in said.replace("\n", "") for name in tokenized(cache))
    assert not (config.parent / "run").exists()

    def refuse(*_: object) -> None:
        raise AssertionError("tokenizes again")

    monkeypatch.setattr(store, "_build", refuse)
    ran = train(config)
    assert ran.status == 0
    # The same lines about the data, word for word.
    lines = [line for line in said.splitlines() if not line.startswith("prepared")]
    assert [line for line in ran.said.splitlines() if line in lines] == lines
    assert re.search(r"held out +file: 4 samples", said)


def test_a_held_out_set_has_nothing_that_is_trained_on(config, shared):
    both = write_jsonl(config.parent / "both.jsonl", stories(shared, 10, first=12))  # three of them are trained on
    said: list[str] = []

    def read(*overrides: str, **began: Any) -> Inputs:
        evals = f"evals=[{{name: file, path: {both}, every: 9}}]"
        chosen = load(config, ["data.eval_fraction=0", evals, *overrides], Config)
        said.clear()
        tokenizer = open_tokenizer(chosen.model)
        return read_inputs(chosen, tokenizer, lambda what, value: said.append(f"{what} {value}"), **began)

    held_out = read().held_out["file"]
    assert sorted({held_out.store.origin(int(i))[1] for i in held_out.plan.piece_sample}) == [*range(4, 11)]
    assert " without 3 of these samples, whose records are trained on, too" in said
    # A run of an earlier version keeps its set, and is told.
    before = read(held_out_by="samples").held_out["file"]
    assert {before.store.origin(int(i))[1] for i in before.plan.piece_sample} == {*range(1, 11)}
    assert any("file: 3 of 10 held-out pieces are of records that are trained on" in line for line in said)
    with pytest.raises(UserError, match=r"evals file .*each of its records is trained on"):
        read(f"evals.0.path={config.parent / 'stories.jsonl'}")
    (config.parent / "link.jsonl").symlink_to("stories.jsonl")
    with pytest.raises(UserError, match=r"data.sources.0 .*both have the file"):
        read(f"data.sources.1={{path: {config.parent / 'link.jsonl'}}}")


def test_it_starts_no_backend_of_jax(config):
    """A machine without the accelerator of the run, or whose accelerator is taken, will do."""
    command = [sys.executable, "-m", "jaxllm.prepare", str(config)]
    environment = {**os.environ, "JAX_PLATFORMS": "a platform that does not exist"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(tokenized(config.parent / "cache")) == 2


def test_what_is_wrong_is_said_as_a_run_says_it(config, capsys):
    assert main([str(config), "data.sources.0.path=nowhere.jsonl"]) == 2
    assert "error: no data file matches 'nowhere.jsonl'" in capsys.readouterr().err
    assert main([str(config), "model.vocab_size=100"]) == 2
    assert "token ids up to 511" in capsys.readouterr().err
    assert main([str(config), "data.sources.0.paht=a"]) == 2
    assert "Did you mean 'data.sources.0.path'?" in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: python -m jaxllm.prepare CONFIG.yaml" in capsys.readouterr().out
    assert main([]) == 2


def test_a_run_from_the_hub(hub, config, shared, capsys):
    """Model, tokenizer and data by their Hub names, all from the cache; the log names the revisions."""
    model = shared / "models/stories260K"
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    add_repository(hub, "model", "owner/tiny", files)
    lines = "".join(json.dumps(story) + "\n" for story in stories(shared, 12)).encode()
    add_repository(
        hub, "dataset", "owner/stories", {"train.jsonl": lines, "test.jsonl": lines[:2000].rpartition(b"\n")[0]}
    )
    overrides = [
        "model={path: owner/tiny}",
        "data.sources=[{path: owner/stories}]",
        "evals=[{name: share, every: 9}, {name: test, path: owner/stories, split: test, every: 9}]",
    ]
    assert main([str(config), *overrides]) == 0
    said = capsys.readouterr().out
    assert "files     owner/stories: hf://datasets/owner/stories@0123456/train.jsonl" in said
    assert "files     owner/stories: hf://datasets/owner/stories@0123456/test.jsonl" in said
    ran = train(config, *overrides)
    assert ran.status == 0
    assert "from hf://owner/tiny@0123456" in ran.said
    assert (ran.folder / "export/hf/model.safetensors").is_file()
    pinned = [f"hf://datasets/owner/stories@{COMMIT}", f"hf://owner/tiny@{COMMIT}"]
    assert json.loads((ran.folder / "env.json").read_text())["hub"] == pinned
