"""A run that an earlier version began resumes: its data keep the name that this version gave them."""

from datetime import date
from pathlib import Path

import pytest

from jaxllm.data.records.source import SourceConfig
from jaxllm.data.rows.old_store import old_key
from jaxllm.data.text import tokenize

CLOCK = "{% for m in messages %}<|{{ m.role }}|>{{ strftime_now('%Y-%m-%d') }}{{ m.content }}<|end|>{% endfor %}"
CLOCK += "{% if add_generation_prompt %}<|assistant|>{{ strftime_now('%Y-%m-%d') }}{% endif %}"
CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> list[SourceConfig]:
    """In the working folder, as the old name covers where the files are."""
    monkeypatch.chdir(tmp_path)
    # The tokenizer's own hash follows the version of its library.
    monkeypatch.setattr(tokenize, "fingerprint", lambda _: "tokenizer")
    Path("a.jsonl").write_text('{"question": "one", "answer": "1"}\n')
    Path("chat.jsonl").write_text(CHAT)
    Path("clock.jinja").write_text(CLOCK)
    return [
        SourceConfig(path="a.jsonl", fields={"prompt": "question", "completion": "answer"}, weight=1.0),
        SourceConfig(path="*t.jsonl", chat_template="clock.jinja", template_options={"a": True}, weight=2.0),
    ]


def test_it_is_what_the_earlier_version_wrote(sources, byte_tokenizer):
    assert old_key(sources, byte_tokenizer, date(2026, 11, 30)) == "8f69ebdeb044c0402e547d5e4e175408"
    assert old_key(sources, byte_tokenizer, date(2026, 12, 1)) != "8f69ebdeb044c0402e547d5e4e175408"
    Path("chat.jsonl").write_text(CHAT.replace("yes", "no"))
    assert old_key(sources, byte_tokenizer, date(2026, 11, 30)) != "8f69ebdeb044c0402e547d5e4e175408"
