"""Files behind URLs are copied once a version, and what goes wrong is one message."""

import gzip
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from jaxllm.core.errors import UserError
from jaxllm.files import file_systems, hub, remote
from jaxllm.files.remote import copy, find, is_url, shown
from tests.support.http_files import Files, serving

CONTENT = {
    "/data/README.md": b"of stories",
    "/data/train/a.jsonl": b'{"text": "a"}\n',
    "/data/train/b.jsonl": b'{"text": "b"}\n',
    "/data/test/c.jsonl": b'{"text": "c"}\n',
}


def forget() -> None:
    """What follows is as in another process."""
    find.cache_clear()
    remote._asked.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, as a process that begins finds it."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache" / "remote"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    for path, content in CONTENT.items():
        fs.pipe(path, content)
    yield fs
    fs.store.clear()


@pytest.fixture
def http() -> Iterator[Files]:
    with serving(CONTENT) as files:
        yield files


@pytest.fixture(params=["memory", "http"])
def root(request: pytest.FixtureRequest) -> str:
    """The URL of CONTENT."""
    files = request.getfixturevalue(request.param)
    return files.address if isinstance(files, Files) else "memory:/"


def read(url: str) -> dict[str, bytes]:
    """What the files of a URL hold, by name."""
    found = find(url).files
    return {name: path.read_bytes() for name, path in zip(found, copy(list(found.values())), strict=True)}


def said(url: str) -> str:
    with pytest.raises(UserError) as caught:
        read(url)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://bucket/a", True), ("https://h/a", True), ("hf://o/n", False), ("a/b", False), ("C:\\a", False)],
)
def test_urls(path: str, expected: bool):
    assert is_url(path) == expected


@pytest.mark.parametrize(
    ("inside", "is_folder", "names"),
    [
        ("/data/train/a.jsonl", False, ["a.jsonl"]),
        ("/data/train/*.jsonl", False, ["a.jsonl", "b.jsonl"]),
        ("/data/train/[ab].jsonl", False, ["a.jsonl", "b.jsonl"]),
        ("/data/**/*.jsonl", False, ["test/c.jsonl", "train/a.jsonl", "train/b.jsonl"]),
        ("/data/", True, ["README.md", "test/c.jsonl", "train/a.jsonl", "train/b.jsonl"]),
    ],
)
def test_what_a_url_names(root: str, inside: str, is_folder: bool, names: list[str]):
    listing = find(root + inside)
    assert (listing.is_folder, list(listing.files)) == (is_folder, names)
    base = "/data/train/" if inside.startswith("/data/train") else "/data/"
    assert read(root + inside) == {name: CONTENT[base + name] for name in names}


def test_a_folder_needs_no_slash_where_the_server_knows_folders(memory):
    assert find("memory://data").is_folder


def test_a_copy_is_shown_by_its_url(http: Files):
    found = find(f"{http.address}/data/train/a.jsonl?signature=secret")
    (path,) = copy(list(found.files.values()))
    assert path.name == "a.jsonl"
    assert shown(str(path)) == hub.shown(path) == f"{http.address}/data/train/a.jsonl"
    assert shown("/data/a.jsonl") == "/data/a.jsonl"


def test_a_file_is_copied_once_a_version(http: Files, cache: Path):
    path = "/data/train/a.jsonl"
    for etag, content in (('"1"', b"1"), ('"1"', b"1"), ('"2"', b"2"), ('"2"', b"2")):
        http.content[path], http.headers[path] = content, {"ETag": etag}
        forget()
        assert read(http.address + path) == {"a.jsonl": content}
    assert http.fetched == [path, path]
    assert len(list(cache.rglob("a.jsonl"))) == 2
    assert list(cache.rglob("*.partial")) == []


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_the_time_is_a_version_too(http: Files, header: str):
    path = "/data/train/a.jsonl"
    for content in (b"1", b"2"):
        http.content[path], http.headers[path] = content, {header: content.decode()}
        forget()
        assert read(http.address + path) == {"a.jsonl": content}


def test_the_bytes_are_those_of_the_file(http: Files):
    """A server may say of a packed file that it packed it for the way."""
    packed = gzip.compress(b'{"text": "a"}')
    http.content["/a.jsonl.gz"], http.headers["/a.jsonl.gz"] = packed, {"Content-Encoding": "gzip"}
    assert read(f"{http.address}/a.jsonl.gz") == {"a.jsonl.gz": packed}


def test_a_process_sees_one_version(http: Files):
    path = "/data/train/a.jsonl"
    for content in (b"1", b"2"):
        http.content[path], http.headers[path] = content, {"ETag": content.decode()}
        assert read(http.address + path) == {"a.jsonl": b"1"}


def test_a_copy_that_was_cut_is_made_again(memory):
    (path,) = copy(list(find("memory://data/README.md").files.values()))
    os.truncate(path, 3)
    assert read("memory://data/README.md") == {"README.md": b"of stories"}


def test_what_a_kill_left_is_removed(memory, cache: Path):
    (path,) = copy(list(find("memory://data/README.md").files.values()))
    path.unlink()
    left = path.with_name("README.md.1.partial")
    left.write_bytes(b"of")
    copy(list(find("memory://data/README.md").files.values()))
    assert not left.exists()


@pytest.mark.parametrize("content", [b"longer than before", b"of others "])
def test_a_file_that_changes_while_it_is_copied(memory, cache: Path, content: bytes):
    listing = find("memory://data/README.md")
    memory.pipe("/data/README.md", content)
    with pytest.raises(UserError, match=r"^memory://data/README.md changes while it is copied"):
        copy(list(listing.files.values()))
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_server_that_falls_silent(http: Files, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = "/data/train/a.jsonl"
    http.short.add(path)
    monkeypatch.setattr(file_systems, "STALL_SECONDS", 1)
    assert said(http.address + path).endswith("the server has sent nothing for 1 seconds; check the network")
    assert list(cache.rglob("*.partial")) == []


def test_a_disk_that_is_too_small(memory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5))
    message = said("memory://data/train/*.jsonl")
    assert message.startswith("memory://data/train/a.jsonl and 1 other file take 28 bytes, and the disk of the cache")
    assert "has 5 bytes free; set JAXLLM_CACHE" in message


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "no such file"), (403, "does not let you read it"), (500, "cannot be read (500 Internal Server Error)")],
)
def test_what_a_server_refuses(http: Files, status: int, words: str):
    http.statuses["/data/README.md"] = status
    message = said(f"{http.address}/data/README.md?signature=secret")
    assert message.startswith(f"{http.address}/data/README.md: ")
    assert words in message
    assert "secret" not in message


def test_a_server_that_is_not_there(http: Files):
    for url in ("http://127.0.0.1:9/a.jsonl", "http://127.0.0.1:9/*.jsonl", "http://127.0.0.1:9/"):  # `discard`
        assert "cannot be read (ClientConnectorError" in said(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://data/d.jsonl", "memory://data/d.jsonl: the server has no such file; look at its spelling"),
        ("memory://data/*.csv", "memory://data/*.csv names no file; look at its spelling"),
        ("memory://data/../b", "memory://data/../b: the server has no such file; look at its spelling"),
        ("memry://a", "memry://a: memry:// is no protocol of fsspec. Did you mean 'memory'?"),
        ("file:///data", "file:///data is on this machine; give its path, without file://"),
    ],
)
def test_urls_that_name_nothing(memory, url: str, message: str):
    assert said(url) == message


def test_a_name_that_would_leave_the_cache(memory):
    memory.store["/data/../a.jsonl"] = memory.store["/data/README.md"]
    assert "has '..' in it" in said("memory://data/")


def test_a_protocol_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert said("s3://bucket/a.jsonl").startswith(
        "s3://bucket/a.jsonl: the package that reads s3:// is not installed (Import"
    )
    assert "`pip install 'jaxllm[remote]'`" in said("s3://bucket/a.jsonl")


def test_a_model_folder(memory):
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"a"}
    for name, content in {**files, "old/config.json": b"old"}.items():
        memory.pipe(f"/models/m/{name}", content)
    folder = hub.model_folder("memory://models/m", "tokenizer")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert hub.model_folder("memory://models/m/", "weights") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert hub.shown(folder) == "memory://models/m"
    assert not (folder / "pytorch_model.bin").exists()

    memory.pipe("/models/m/model.safetensors", b"new weights")
    forget()
    other = hub.model_folder("memory://models/m", "weights")
    assert other != folder
    assert (other / "model.safetensors").read_bytes() == b"new weights"
    with pytest.raises(UserError, match=r"^memory://data/ holds no config.json"):
        hub.model_folder("memory://data", "config")
