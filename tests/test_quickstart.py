"""The quickstart, on a model too small to learn: its parts fit together and leave what they promise."""

import importlib.util
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
TINY = [
    "train.steps=3",
    "train.batch_size=8",
    "data.seq_len=64",
    "model.num_hidden_layers=1",
    "model.hidden_size=48",
    "model.intermediate_size=64",
    "evals.0.path=held_out_of_the_held_out.jsonl",
]


def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = quickstart()
    files = script.stdlib_files()
    script.write_documents(files[:8], tmp_path / "held_out_of_the_held_out.jsonl")

    assert script.main(TINY) == 0
    out = capsys.readouterr().out
    assert "held_out: loss" in out
    for snippet in script.SNIPPETS:
        assert snippet.strip().splitlines()[0] in out
    assert "What to try next" in out

    export = tmp_path / "runs" / "quickstart" / "export" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(export)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(export / "tokenizer.model"))
    for path in files[::40]:
        text = script.read_source(path)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == pieces.encode(text), path
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text, path
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.config.vocab_size == len(tokenizer) == script.VOCAB_SIZE
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_held_out_files_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = quickstart()
    monkeypatch.setattr(script, "stdlib_files", lambda: sorted((ROOT / "jaxllm" / "core").glob("*.py")))
    monkeypatch.setattr(script, "VOCAB_SIZE", 400)
    monkeypatch.setattr(script, "HELD_OUT_EVERY", 3)
    script.prepare()
    train, held_out = (set((script.DATA / name).read_text().splitlines()) for name in ("train.jsonl", "held_out.jsonl"))
    assert train
    assert held_out
    assert not train & held_out
    assert len(train | held_out) == len(script.stdlib_files())
