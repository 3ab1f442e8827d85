"""What the README shows works: its commands, its configs and its Python."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from jaxllm.core.config import load
from jaxllm.generate.__main__ import main as generate
from jaxllm.train.__main__ import main as train
from jaxllm.train.config import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Smaller than what the README shows: the commands are tested, not the results.
SHORT = ["train.epochs=null", "train.steps=2", "train.batch_size=8", "train.micro_batch_size=1", "data.seq_len=64"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def test_opens_with_the_two_commands() -> None:
    assert [words[0] for words in commands()[:2]] == ["./scripts/quickstart", "./scripts/test"]


def test_every_command_exists() -> None:
    known = {"./scripts/quickstart", "./scripts/test", "python3.11", "pip", "python"}
    for words in commands():
        assert words[0] in known
        if words[0].startswith("./"):
            assert (ROOT / words[0]).is_file()
        if words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/") / "__main__.py").is_file()


def test_commands_run(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Trains, then generates from the run, then from a Hugging Face folder, as the README goes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "MODEL").symlink_to(shared / "models" / "stories260K")
    (tmp_path / "alpaca.json").symlink_to(shared / "data" / "alpaca_gpt4" / "alpaca_en_demo.json")
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    programs = {"jaxllm.train": lambda words: train([*words, *SHORT]), "jaxllm.generate": generate}
    ran = 0
    for words in commands():
        if words[:2] == ["python", "-m"]:
            assert programs[words[2]](words[3:]) == 0, capsys.readouterr().err
            ran += 1
    assert ran >= 3


@pytest.mark.parametrize("number", range(2))
def test_configs_parse(number: int, tmp_path: Path) -> None:
    text = blocks("yaml")[number]
    if number == 1:  # it shows the model section of configs/pretrain.yaml
        rest = (ROOT / "configs" / "pretrain.yaml").read_text()
        text = re.sub(r"^model:\n(  .*\n)+", text, rest, flags=re.MULTILINE)
    (tmp_path / "config.yaml").write_text(text)
    load(tmp_path / "config.yaml", [], Config)


def test_python_runs(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(shared / "models" / "stories260K")
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    # The logits are those of transformers, and what was saved is what was loaded.
    model = LlamaForCausalLM.from_pretrained(tmp_path / "MODEL")
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 2, 3]])).logits.numpy()
    assert names["logits"].dtype == "float32"
    np.testing.assert_allclose(names["logits"], wanted, atol=1e-4)
    original, copy = (load_file(tmp_path / folder / "model.safetensors") for folder in ("MODEL", "COPY"))
    assert original.keys() == copy.keys()
    assert all(np.array_equal(original[name], copy[name]) for name in original)
