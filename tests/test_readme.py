"""What the README shows works: its commands, its configs and its Python."""

import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from jaxllm.core.config import load
from jaxllm.runs.config import Config
from tests.support.whole_runs import stories, write_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Smaller than what the README shows: the commands are tested, not the results.
SHORT = ["train.epochs=null", "train.batch_size=8", "train.micro_batch_size=1", "data.seq_len=256"]
SMALL_MODEL = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1"]
SMALL_MODEL += ["model.num_attention_heads=2", "model.num_key_value_heads=2"]
OF = {
    "configs/pretrain.yaml": [*SHORT, *SMALL_MODEL, "optim.schedule.warmup=1", "data.eval_fraction=0.2"],
    "configs/finetune.yaml": SHORT,
    "configs/chat.yaml": SHORT,
    "configs/lisa.yaml": SHORT,
    "configs/lora.yaml": SHORT,
    "configs/dora.yaml": SHORT,
    "configs/qlora.yaml": [*SHORT, "model.quantize=int8"],  # the small model has rows that NF4's blocks do not divide
}


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


@pytest.mark.full
def test_recipes_run(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The README from its first command to its last, in one folder, as a reader types it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "MODEL").symlink_to(shared / "models" / "stories260K")
    (tmp_path / "TOKENIZER").symlink_to(shared / "models" / "stories260K")
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca(shared, 60)))
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "stories.jsonl", stories(shared, 20))
    conversations = (shared / "data" / "sgd_chat" / "dev.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "conversations.jsonl").write_text("".join(conversations[:60]))

    said = []
    for words in commands():
        if words[:2] != ["python", "-m"]:
            continue
        command, arguments = words[2], words[3:]
        if command in ("jaxllm.train", "jaxllm.prepare", "jaxllm.plan"):
            steps = [] if any(word.startswith("train.steps=") for word in arguments) else ["train.steps=2"]
            arguments = [arguments[0], *OF[arguments[0]], *steps, *arguments[1:]]
            arguments = ["train.steps=3" if word.startswith("train.steps=3") else word for word in arguments]
        if "--chat" in arguments:
            monkeypatch.setattr("sys.stdin", io.StringIO("I need a bus to Washington.\n"))
            arguments += ["--max-new-tokens", "3"]
        if command == "jaxllm.plan":  # the tests' own process has hidden CUDA's compiler
            done = subprocess.run(
                [sys.executable, "-m", command, *arguments], capture_output=True, text=True, check=True
            )
            said.append((command, done.stdout))
            continue
        main = importlib.import_module(f"{command}.__main__").main
        assert main(arguments) == 0, f"{words}: {capsys.readouterr().err}"
        said.append((command, capsys.readouterr().out))

    trained = [out for command, out in said if command == "jaxllm.train"]
    assert "resuming" in trained[-1]
    assert "runs/alpaca/checkpoints/2, 1 of 3 steps to go" in trained[-1]
    planned, prepared, pretrained = said[0][1], said[1][1], trained[0]
    assert "fits" in planned
    assert "prepared" in prepared
    assert next(line for line in prepared.splitlines() if line.startswith("data")) in pretrained
    template = tmp_path / "configs" / "chat.jinja"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "chat" / "export" / "hf")
    assert tokenizer.chat_template == template.read_text()
    for export in ("runs/alpaca/export/hf", "runs/chat/export/hf", "runs/pretrain/export/hf", "exported"):
        LlamaForCausalLM.from_pretrained(tmp_path / export)


def alpaca(shared: Path, count: int) -> list[Any]:
    return json.loads((shared / "data" / "alpaca_gpt4" / "alpaca_en_demo.json").read_text())[:count]


@pytest.mark.parametrize("number", range(2))
def test_configs_parse(number: int, tmp_path: Path) -> None:
    text = blocks("yaml")[number]
    if number == 0:  # it shows the model section of configs/pretrain.yaml
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
