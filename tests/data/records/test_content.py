"""A file has the hash of its bytes, and a file that is known is not read again."""

import hashlib
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.records import content
from jaxllm.data.records.content import hashes

SMALL = content.PIECES * content.PIECE_BYTES
LARGE = 40 * SMALL


def make(path: Path, size: int) -> Path:
    """A file with another byte at each place in a period that no piece has."""
    path.write_bytes((bytes(range(251)) * (size // 251 + 1))[:size])
    return path


def told(path: Path, cache: Path) -> tuple[str, int]:
    """The hash, and how many bytes were read beside the sample."""
    counts: list[int] = []
    (found,) = hashes([str(path)], cache, counts.append)
    return found, sum(counts)


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, LARGE])
def test_it_is_the_hash_of_the_content(tmp_path: Path, size: int):
    path = make(tmp_path / "a", size)
    for _ in range(2):
        assert told(path, tmp_path / "cache")[0] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_known_file_is_not_read_again(tmp_path: Path):
    path, cache = make(tmp_path / "a", LARGE), tmp_path / "cache"
    first = told(path, cache)
    assert first[1] == LARGE
    assert told(path, cache) == (first[0], 0)
    (tmp_path / "link").symlink_to(path)
    assert told(tmp_path / "link", cache) == (first[0], 0)
    os.utime(path, (1, 1))  # touched: it is read once more
    assert told(path, cache) == first
    assert told(path, cache) == (first[0], 0)
    shutil.copyfile(path, tmp_path / "b")
    assert told(tmp_path / "b", cache) == first
    path.rename(tmp_path / "c")
    assert told(tmp_path / "c", cache) == first


@pytest.mark.parametrize("place", [0, LARGE // 2 + 9, LARGE - 1])
def test_a_change_is_seen_wherever_it_is(tmp_path: Path, place: int):
    """Even if its size and its time of modification are put back: the time of the change itself cannot be."""
    path, cache = make(tmp_path / "a", LARGE), tmp_path / "cache"
    first, times = told(path, cache), path.stat()
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1
    time.sleep(0.05)  # more than a tick of the file system's clock
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert told(path, cache) == (hashlib.sha256(changed).hexdigest(), LARGE)
    assert told(path, cache)[0] != first[0]


def test_damaged_entries_and_a_cache_that_cannot_be_written(tmp_path: Path):
    path, cache = make(tmp_path / "a", LARGE), tmp_path / "cache"
    first = told(path, cache)
    for entry in (cache / "files").iterdir():
        entry.write_bytes(b"\xff half")
    assert told(path, cache) == first
    (tmp_path / "file").touch()
    assert [told(path, tmp_path / "file") for _ in range(2)] == [first, first]


def test_a_file_that_is_being_written(tmp_path: Path):
    path = make(tmp_path / "a", LARGE)

    def append(_: int) -> None:
        with path.open("ab") as stream:
            stream.write(b"x")

    with pytest.raises(UserError, match="a changes while it is read"):
        hashes([str(path)], tmp_path / "cache", append)


def test_two_processes_read_a_file_once(tmp_path: Path):
    path, cache, counts = make(tmp_path / "a", LARGE), tmp_path / "cache", []
    threads = [threading.Thread(target=hashes, args=([str(path)], cache, counts.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == LARGE
