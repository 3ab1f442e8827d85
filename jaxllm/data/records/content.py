"""What data files hold, known at a start without reading them all: each is hashed once, and the hash is remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxllm.core.compilation_cache import alone
from jaxllm.core.errors import UserError

# A sample is the beginning, the end and places evenly between. A file that is no larger is read whole.
PIECES = 8
PIECE_BYTES = 8 << 10
_CHUNK = 1 << 20


def hashes(files: Sequence[str], cache: Path, advance: Callable[[int], object] = lambda _: None) -> list[str]:
    """The SHA-256 of the content of each file.

    A large file is read once. After that its hash is found in `cache` by its real path, size, times and a sample of
    64 KiB. A file that was copied, moved or touched is read once more, and has the same hash if it holds the same. A
    change that keeps all of these, such as one that the file system gives no new time, is not seen.
    `advance(n)` is called for every n bytes of a file that is read. Raises UserError for a file that changes meanwhile.
    """
    paths = list(dict.fromkeys(os.path.realpath(file) for file in files))
    table = cache / "files"
    found = {path: _remembered(path, table) for path in paths}
    if missing := [path for path, digest in found.items() if digest is None]:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a cache that cannot be written: each process reads for itself
                held.enter_context(alone(cache / "locks" / "files.lock"))
            with ThreadPoolExecutor() as pool:  # hashing and reading both leave Python's lock to others
                found |= zip(missing, pool.map(lambda path: _read(path, table, advance), missing), strict=True)
    return [str(found[os.path.realpath(file)]) for file in files]


def _remembered(path: str, table: Path) -> str | None:
    size, name = _name(path)
    if size <= PIECES * PIECE_BYTES:
        return name
    with contextlib.suppress(OSError):
        text = (table / name).read_text(errors="replace")
        if len(text) == 64:  # a damaged entry is no entry
            return text
    return None


def _read(path: str, table: Path, advance: Callable[[int], object]) -> str:
    """The hash of a large file, which is remembered."""
    if (found := _remembered(path, table)) is not None:  # another process was first
        return found
    left, before = _name(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(min(_CHUNK, left)):  # a file that grows meanwhile has no end
            left -= len(chunk)
            digest.update(chunk)
            advance(len(chunk))
    if _name(path)[1] != before:
        raise UserError(f"the data file {path} changes while it is read; start again when nothing writes to it")
    with contextlib.suppress(OSError):  # it is read again at the next start
        table.mkdir(parents=True, exist_ok=True)
        unfinished = table / f"{before}.{os.getpid()}.partial"
        unfinished.write_text(digest.hexdigest())
        unfinished.replace(table / before)
    return digest.hexdigest()


def _name(path: str) -> tuple[int, str]:
    """The size of a file, and of a small one its hash, of a large one what its hash is remembered by."""
    with open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        if status.st_size <= PIECES * PIECE_BYTES:
            return status.st_size, hashlib.sha256(stream.read()).hexdigest()
        facts = [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        digest = hashlib.sha256(json.dumps(facts).encode(errors="surrogateescape"))
        for i in range(PIECES):
            stream.seek((status.st_size - PIECE_BYTES) * i // (PIECES - 1))
            digest.update(stream.read(PIECE_BYTES))
    return status.st_size, digest.hexdigest()
