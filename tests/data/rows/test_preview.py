"""The sample that is shown has exactly its trained tokens marked, and a window without any end is refused."""

from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig
from jaxllm.data.rows import preview as shown
from jaxllm.data.rows.loader import DataConfig, plans
from jaxllm.data.rows.preview import preview, require_ends
from jaxllm.data.rows.store import open_or_build

TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4\x1b[31m"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes\nyes"},
]
MARKED = (
    "line 1: 15 of 68 tokens are trained, those in ⟦ ⟧\n"
    "<|user|>2+2?<|end|><|assistant|>⟦4\\x1b[31m<|end|>⟧"
    "<|user|>Sure?<|end|><|assistant|>⟦Yes↵\nyes<|end|>⟧"
)


def rows(path: str, tokenizer, cache: Path, seq_len: int = 128, **options):
    config = DataConfig(sources=[SourceConfig(path=path, **options)], seq_len=seq_len)
    store = open_or_build(config.sources, tokenizer, cache=cache, progress=False)
    return store, plans(config, store, 0, 1)[0]


def printed(text, *, colours: bool) -> str:
    console = Console(force_terminal=colours, color_system="standard" if colours else None, width=200)
    with console.capture() as captured:
        console.print(text, soft_wrap=True)
    return captured.get()


def test_trained_tokens_are_marked_with_and_without_colours(write_lines, byte_tokenizer, tmp_path: Path):
    text = preview(*rows(write_lines([{"messages": TURNS}]), byte_tokenizer, tmp_path), byte_tokenizer)
    plain = printed(text, colours=False)
    assert plain.endswith(MARKED + "\n")
    coloured = printed(text, colours=True)
    assert "\x1b[32m⟦\x1b[0m\x1b[32m4\\x1b[31m\x1b[0m\x1b[1;32m<|end|>\x1b[0m\x1b[32m⟧\x1b[0m" in coloured
    assert "\x1b[1m<|end|>\x1b[0m" in coloured


def test_only_what_the_window_holds_is_shown(write_lines, byte_tokenizer, tmp_path: Path):
    store, plan = rows(write_lines([{"messages": TURNS}]), byte_tokenizer, tmp_path, seq_len=40)
    assert str(preview(store, plan, byte_tokenizer)).endswith("⟦4\\x1b[31m<|end|>⟧<|user|>")


def test_the_first_token_of_a_document_is_not_marked(shared: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tokenizers/llama2")
    path = str(shared / "data/tinystories/valid.jsonl")
    text = str(preview(*rows(path, tokenizer, tmp_path, seq_len=512), tokenizer))
    assert "\n<s>⟦ Once upon a time" in text
    assert text.endswith("</s>⟧")
    assert "characters …" in text
    assert len(text) < shown.LONGEST + 200
    gpt2 = AutoTokenizer.from_pretrained(shared / "models/tokenizers/gpt2")  # puts nothing in front
    assert "\nOnce⟦ upon a time" in str(preview(*rows(path, gpt2, tmp_path, seq_len=512), gpt2))


def test_a_long_conversation_is_shortened(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shown, "MOST", 60)
    text = str(preview(*rows(write_lines([{"messages": TURNS}]), byte_tokenizer, tmp_path), byte_tokenizer))
    assert text.endswith(" … 21 more tokens")


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_a_window_that_cuts_off_every_end_is_refused(write_lines, byte_tokenizer, tmp_path: Path, column: str):
    long = {"role": "assistant", "content": "4" * 100}
    record = {"messages": [TURNS[0], long]} if column == "messages" else {"prompt": "2+2?", "completion": "4" * 100}
    path = write_lines([record] * 3)
    store, plan = rows(path, byte_tokenizer, tmp_path, seq_len=64)
    with pytest.raises(UserError, match=r"each of 3 samples is cut before the first end .* Raise data.seq_len.* 64"):
        require_ends(store, plan)
    require_ends(*rows(path, byte_tokenizer, tmp_path, seq_len=160))
    mixed = write_lines(
        [record, record, {**record, **({"messages": TURNS} if column == "messages" else {"completion": "4"})}]
    )
    require_ends(*rows(mixed, byte_tokenizer, tmp_path, seq_len=64))


def test_tokens_without_any_end_have_none_to_lose(write_lines, byte_tokenizer, tmp_path: Path):
    path = write_lines([{"input_ids": list(range(30))}])
    require_ends(*rows(path, byte_tokenizer, tmp_path, seq_len=8))
    masked = write_lines([{"input_ids": [1, 2, 257], "labels": [-100, 2, -100]}], "masked.jsonl")
    with pytest.raises(UserError, match=r"the end of a turn is never trained .* and not the one of padding"):
        rows(masked, byte_tokenizer, tmp_path)
