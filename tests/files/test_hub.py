"""Names of the Hub lead to its cache, else to the Hub, else to one message that says what to do."""

from pathlib import Path

import pytest

from jaxllm.core.errors import UserError
from jaxllm.files.hub import HubName, fetch, model_folder, pinned, shown
from tests.support.hub_cache import COMMIT, add_repository, ask, server

MODEL = {
    "config.json": b'{"a": 1}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"code",
    "original/params.json": b"{}",
}


def everything(files, text):
    return files


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("owner/name", "model", HubName("model", "owner/name")),
        ("owner/name@v1.0", "dataset", HubName("dataset", "owner/name", "v1.0")),
        ("hf://owner/name", "model", HubName("model", "owner/name")),
        ("hf://datasets/o/n@refs%2Fpr%2F1", "dataset", HubName("dataset", "o/n", "refs/pr/1")),
        ("hf://datasets/o/n@abc/en/*.parquet", "dataset", HubName("dataset", "o/n", "abc", "en/*.parquet")),
        ("name", "model", None),
        ("a/b/c", "model", None),
        ("./name", "model", None),
        ("runs/*.jsonl", "dataset", None),
    ],
)
def test_names(text, kind, name):
    assert HubName.parse(text, kind) == name


@pytest.mark.parametrize(
    ("text", "kind"), [("hf://o/n", "dataset"), ("hf://datasets/o/n", "model"), ("hf://o", "model")]
)
def test_urls_of_something_else(text, kind):
    with pytest.raises(UserError, match="does not name a"):
        HubName.parse(text, kind)


def test_what_is_cached_is_not_asked_for(hub):
    snapshot = add_repository(hub, "model", "owner/name", MODEL)
    assert model_folder("owner/name", "weights") == snapshot
    assert model_folder(f"owner/name@{COMMIT}", "weights") == snapshot
    assert shown(snapshot / "config.json") == "hf://owner/name@0123456/config.json"
    assert pinned(snapshot / "config.json") == f"hf://owner/name@{COMMIT}"
    assert shown("/data/snapshots/a.txt") == "/data/snapshots/a.txt"
    assert pinned("/data/snapshots/a.txt") is None


def test_each_revision_is_its_own(hub):
    newest = add_repository(hub, "model", "owner/name", MODEL)
    older = add_repository(hub, "model", "owner/name", MODEL, commit=COMMIT[::-1], ref="v1")
    assert model_folder("owner/name", "weights") == model_folder("owner/name@main", "weights") == newest
    assert (
        model_folder("owner/name@v1", "weights") == model_folder(f"hf://owner/name@{COMMIT[::-1]}", "weights") == older
    )
    assert "is not in the cache" in said("owner/name@v2")


def test_a_folder_that_is_here_comes_first(hub, tmp_path, monkeypatch):
    add_repository(hub, "model", "owner/name", MODEL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert model_folder("owner/name", "weights") == Path("owner/name")
    assert model_folder("owner/other/name", "weights") == Path("owner/other/name")


def said(name: str, what="weights") -> str:
    with pytest.raises(UserError) as caught:
        model_folder(name, what)
    return str(caught.value)


def test_offline(hub):
    message = said("owner/name@v1")
    for part in ("the Hub model owner/name@v1 is not in the cache", str(hub), "offline", "no file or folder"):
        assert part in message
    assert "`hf download owner/name --revision v1`" in message


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    ask(monkeypatch, "http://127.0.0.1:9")  # the port of `discard`, where nobody listens
    with pytest.raises(UserError) as caught:
        fetch(HubName("dataset", "owner/name"), everything)
    assert "http://127.0.0.1:9 cannot be asked (ConnectError" in str(caught.value)
    assert "`hf download owner/name --repo-type dataset`" in str(caught.value)


@pytest.mark.parametrize("shards", [["model.safetensors.index.json", "model-00001-of-00002.safetensors"], []])
def test_part_of_a_model(hub, shards):
    add_repository(hub, "model", "owner/name", dict.fromkeys(["config.json", "tokenizer.json", *shards], b"{}"))
    assert model_folder("owner/name", "tokenizer").name == model_folder("owner/name", "config").name == COMMIT
    assert "is not whole in the cache" in said("owner/name")
    assert "has not all of its weights as safetensors" in said("owner/name")


def test_download(hub, monkeypatch):
    with server("model", "owner/name", MODEL) as (address, fetched):
        ask(monkeypatch, address)
        folder = model_folder("owner/name", "tokenizer")
        assert sorted(fetched) == ["config.json", "tokenizer.json"]
        folder = model_folder("owner/name", "weights")
        assert (folder.name, (folder / "model.safetensors").read_bytes()) == (COMMIT, b"weights")
        assert sorted(fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert model_folder("owner/name", "weights") == folder


def test_what_the_hub_refuses(hub, monkeypatch):
    with server("model", "owner/name", {"config.json": b"{}", "pytorch_model.bin": b""}) as (address, _):
        ask(monkeypatch, address)
        assert "the Hub model owner/nobody does not exist" in said("owner/nobody")
        assert "has not all of its weights as safetensors (found: none)" in said("owner/name")
        assert "holds no tokenizer" in said("owner/name", "tokenizer")
