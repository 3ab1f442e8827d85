"""The command: what it completes, and what it says about wrong input."""

import json
import shutil
from pathlib import Path

import pytest
from whole_runs import train, workplace

from jaxllm.generate.__main__ import main

PROMPT = ["--prompt", "Once upon a time"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared):
    """A run of two steps, with a checkpoint of each."""
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        model = f"model={{path: {shared / 'models/stories260K'}}}"
        yield train(config, model, "train.steps=2", "checkpoint.every=1", "evals.0.every=9").folder


@pytest.fixture
def story(shared, tmp_path) -> Path:
    """A copy of stories260K that a test may change."""
    folder = shutil.copytree(
        shared / "models/stories260K", tmp_path / "model", ignore=shutil.ignore_patterns("llama2c")
    )
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def completes(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    return said.err


def test_a_hugging_face_folder(shared, capsys):
    folder = shared / "models/stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    text = completes(capsys, folder, *PROMPT, "--max-new-tokens", 20)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    assert (reference["prompt"] + reference["greedy_text"].removeprefix(reference["prompt"])).startswith(text[:-1])


def test_a_run_is_its_newest_checkpoint_and_its_export(run, capsys):
    texts = [
        completes(capsys, folder, *PROMPT, "--max-new-tokens", 20)
        for folder in (run, run / "checkpoints/2", run / "export/hf", run / "checkpoints/1")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] != texts[0]


def test_two_prompts_and_a_seed(shared, capsys):
    def sample(seed: int) -> str:
        options = ["--prompt", "Tom", "--temperature", 0.8, "--top-p", 0.9, "--max-new-tokens", 8, "--seed", seed]
        return completes(capsys, shared / "models/stories260K", *PROMPT, *options)

    first = sample(1)
    parts = first.split("\n" + "-" * 60 + "\n")
    assert len(parts) == 2
    assert parts[0].startswith("Once upon a time")
    assert parts[1].startswith("Tom")
    assert sample(2) != first


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_it_stops_where_the_model_s_files_say(where, story, capsys):
    """A list of stop tokens, as chat models have it; without generation_config.json the one of config.json."""
    whole = completes(capsys, story, *PROMPT, "--max-new-tokens", 20)
    reference = json.loads((story / "reference.json").read_text())
    comma = reference["greedy_new_ids"][0]
    if where == "config.json":
        (story / "generation_config.json").unlink()
    content = json.loads((story / where).read_text())
    (story / where).write_text(json.dumps({**content, "eos_token_id": [2, comma]}))
    assert whole.startswith("Once upon a time,")
    assert completes(capsys, story, *PROMPT, "--max-new-tokens", 20) == "Once upon a time\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens must be at least 1"),
        (["--temperature", -1], "temperature must be at least 0"),
        (["--top-k", 5], "temperature 0 takes the most likely token"),
        (["--temperature", 1, "--top-p", 2], "top_p must be above 0 and at most 1"),
        (["--seed", -1], "--seed must be from 0"),
    ],
    ids=str,
)
def test_wrong_options(options, message, shared, capsys):
    assert message in fails(capsys, shared / "models/stories260K", *PROMPT, *options)


def test_folders_without_a_model(run, tmp_path, capsys):
    assert "there is no such folder" in fails(capsys, tmp_path / "nowhere", *PROMPT)
    assert "has no config.json" in fails(capsys, tmp_path, *PROMPT)
    assert "there is no such folder" in fails(capsys, run / "checkpoints/7", *PROMPT)
    begun = shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    assert f"{begun}: the run has no complete checkpoint yet" in fails(capsys, begun, *PROMPT)
    (begun / "checkpoints").mkdir()
    assert f"{begun}: the run has no complete checkpoint yet" in fails(capsys, begun, *PROMPT)


def test_broken_folders(run, story, tmp_path, capsys):
    (story / "generation_config.json").write_text("{")
    assert "generation_config.json: is not valid JSON" in fails(capsys, story, *PROMPT)
    config = json.loads((story / "config.json").read_text())
    (story / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    assert "hidden_size" in fails(capsys, story, *PROMPT) or "shape" in fails(capsys, story, *PROMPT)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    shutil.rmtree(damaged / "checkpoints/2/state")
    assert f"the checkpoint {damaged}/checkpoints/2 is damaged: state/" in fails(capsys, damaged, *PROMPT)
