"""The command that turns checkpoints of a run into folders for transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxllm.convert.__main__ import main
from tests.support.whole_runs import train, workplace


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared):
    """A run of two steps from a pretrained model, with a checkpoint of each."""
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        model = f"model={{path: {shared / 'models/stories260K'}}}"
        yield train(config, model, "train.steps=2", "checkpoint.every=1", "evals.0.every=9").folder


@pytest.fixture(scope="module")
def new_run(tmp_path_factory, shared):
    """The same from scratch."""
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield train(config, "train.steps=2", "evals.0.every=9").folder


def fails(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("which", ["run", "new_run"])
def test_the_newest_checkpoint_is_what_the_run_exported(which, request, tmp_path, capsys):
    folder = request.getfixturevalue(which)
    assert main(["to-hf", str(folder), str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    exported = {path.name: path for path in (folder / "export" / "hf").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == exported.keys()
    for name, path in exported.items():
        written = tmp_path / "out" / name
        if name == "config.json":
            assert json.loads(written.read_text()) == json.loads(path.read_text())
        elif name == "model.safetensors":
            ours, theirs = load_file(written), load_file(path)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        else:
            assert written.read_bytes() == path.read_bytes(), name


def test_an_earlier_checkpoint_in_another_dtype(run, tmp_path):
    first = run / "checkpoints" / "1"
    assert main(["to-hf", str(first), str(tmp_path / "first")]) == 0
    assert main(["to-hf", str(first), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    whole, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "half"))
    assert half.dtype == torch.bfloat16
    last = AutoModelForCausalLM.from_pretrained(run / "export" / "hf")
    for ours, rounded, later in zip(whole.parameters(), half.parameters(), last.parameters(), strict=True):
        assert torch.equal(ours.to(torch.bfloat16), rounded)
        assert not torch.equal(ours, later)
    assert AutoTokenizer.from_pretrained(tmp_path / "half")("Once")["input_ids"]


def test_a_hugging_face_folder_is_written_in_another_dtype(shared, tmp_path):
    source = shared / "models" / "stories260K"
    assert main(["to-hf", str(source), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "half", source))
    assert model.dtype == torch.bfloat16
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, changed, Path.unlink, a_folder], ids=lambda damage: damage.__name__)
def test_a_run_with_a_damaged_file(damage, run, tmp_path, capsys):
    """It gives no other model and no other tokenizer, but one message, from wherever the run is named."""
    for name in [path.relative_to(run) for path in (*run.glob("*.*"), *run.glob("model/*")) if path.is_file()]:
        if name.name == "metrics.jsonl":
            continue
        copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "2", "tensorboard"))
        damage(copy / name)
        for src in (copy, copy / "checkpoints/1"):
            said = fails(capsys, "to-hf", src, tmp_path / "out")
            assert said.startswith(f"error: the run {copy} is damaged: {name} "), said
        assert not (tmp_path / "out").exists()
        shutil.rmtree(copy)


def test_a_run_of_an_older_version_has_no_seal(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    (copy / "SHA256SUMS").unlink()
    assert main(["to-hf", str(copy), str(tmp_path / "out")]) == 0
    assert f"note: {copy} has no SHA256SUMS" in capsys.readouterr().err
    assert not (copy / "SHA256SUMS").exists()
    config = (copy / "config.resolved.yaml").read_text()
    (copy / "config.resolved.yaml").write_text(config.partition("peft:")[0])
    assert "config.resolved.yaml: lacks peft, train, " in fails(capsys, "to-hf", copy, tmp_path / "cut")
    (copy / "config.resolved.yaml").write_text(config)
    cut(copy / "model/tokenizer.json")
    assert "tokenizer.json: is damaged, and is not copied" in fails(capsys, "to-hf", copy, tmp_path / "cut")
    (copy / "model/config.json").write_text((copy / "model/config.json").read_text().replace("float32", "flaot32"))
    assert "config.json: dtype is 'flaot32'" in fails(capsys, "inspect", copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_damaged_file_of_a_hugging_face_folder_is_not_copied(name, shared, tmp_path, capsys):
    source = shutil.copytree(shared / "models/stories260K", tmp_path / "model")
    source.chmod(0o755)
    (source / name).chmod(0o644)
    cut(source / name)
    assert f"{source / name}: is damaged, and is not copied" in fails(capsys, "to-hf", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_a_hugging_face_folder_is_not_copied(shared, tmp_path, capsys):
    (tmp_path / "secret").write_text("SECRET")
    source = shutil.copytree(shared / "models/stories260K", tmp_path / "model")
    source.chmod(0o755)
    (source / "tokenizer.model").unlink()
    for name in ("tokenizer.model", "chat_template.jinja"):
        (source / name).symlink_to(tmp_path / "secret")
    assert main(["to-hf", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    for name in ("tokenizer.model", "chat_template.jinja"):
        assert f"note: {source / name}: is not copied, for it is a link out of its folder, to {tmp_path}/secret" in said
        assert not (tmp_path / "out" / name).exists()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_inspect_names_every_parameter(run, capsys):
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "llama: 260,032 parameters" in said
    assert "layers/attn/q/kernel" in said
    assert "5 × 64 × 64" in said
    assert "float32" in said


def test_what_cannot_be_converted(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "there is no such folder" in fails(capsys, "to-hf", tmp_path / "nothing", out)
    assert "checkpoints/7" in fails(capsys, "to-hf", run / "checkpoints" / "7", out)
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "holds 'thesis.tex'" in fails(capsys, "to-hf", run, out)
    assert list(out.iterdir()) == [out / "thesis.tex"]


def test_an_adapter_is_never_overwritten(shared, tmp_path, capsys):
    """As where the folder to write is forgotten after two of them."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).write_text("{}")
    adapters = [tmp_path / "first", tmp_path / "second"]
    source = shared / "models" / "stories260K"
    refused = f"{adapters[1]}: holds 'adapter_config.json', which is not part of a Hugging Face export of a model"
    for command in (["merge", source, *adapters], ["to-hf", source, adapters[1]]):
        assert refused in fails(capsys, *command)
    assert (adapters[1] / "adapter_config.json").read_text() == "{}"


def test_the_source_is_never_overwritten(shared, tmp_path, capsys):
    source: Path = shared / "models" / "stories260K"
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    assert "the checkpoint that this model came from" in fails(capsys, "to-hf", source, source)
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
