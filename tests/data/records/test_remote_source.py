"""Records behind URLs: the same records, and the same tokens, as of the files here."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig, find_files, read
from jaxllm.data.rows.store import open_or_build
from jaxllm.data.text.tokenizer import load_tokenizer
from jaxllm.files.remote import find


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    find.cache_clear()
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


def texts(path: str, **options) -> list[str]:
    return [str(record.columns["text"]) for record in read(SourceConfig(path=path, **options))]


def test_splits_of_a_remote_folder(memory):
    memory.pipe("/d/train.jsonl", b'{"text": "a"}\n')
    memory.pipe("/d/test-00000-of-00001.jsonl", b'{"text": "b"}\n')
    assert texts("memory://d") == ["a"]
    assert texts("memory://d", split="test") == ["b"]
    assert texts("memory://d/*.jsonl") == ["b", "a"]
    with pytest.raises(UserError, match=r"'memory://d/train.jsonl' is one file or a glob, which has no split"):
        find_files(SourceConfig(path="memory://d/train.jsonl", split="test"))
    with pytest.raises(UserError, match=r"the folder memory://d has no split 'dev'\. It has: test, train"):
        find_files(SourceConfig(path="memory://d", split="dev"))


def test_the_readme_of_a_remote_folder_decides(memory):
    memory.pipe("/d/README.md", b"---\nconfigs:\n- {config_name: en, data_files: x.jsonl}\n---\n")
    memory.pipe("/d/x.jsonl", b'{"text": "x"}\n')
    memory.pipe("/d/y.jsonl", b'{"text": "y"}\n')
    assert texts("memory://d") == ["x"]


def test_a_damaged_line_is_named_by_its_url(memory):
    memory.pipe("/d/a.jsonl", b'{"text": "a"}\n{"text": 1}\n[]\n')
    with pytest.raises(UserError, match=r"^memory://d/a.jsonl, line 3 is a JSON array"):
        texts("memory://d/a.jsonl")


def test_tokens_are_found_by_content(memory, shared: Path, tmp_path: Path):
    content = b'{"text": "Once upon a time there was a cat."}\n'
    memory.pipe("/d/a.jsonl", content)
    (tmp_path / "b.jsonl").write_bytes(content)
    tokenizer = load_tokenizer(shared / "models" / "stories260K")

    def key(path: str) -> str:
        return open_or_build([SourceConfig(path=path)], tokenizer, progress=False).key

    assert key("memory://d/a.jsonl") == key(str(tmp_path / "b.jsonl"))
    memory.pipe("/d/a.jsonl", content.replace(b"cat", b"dog"))
    find.cache_clear()  # as in another process
    assert key("memory://d/a.jsonl") != key(str(tmp_path / "b.jsonl"))
