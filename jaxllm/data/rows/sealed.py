"""Arrays in a folder that is written once, with checksums by which damage is found where it is read.

Each array is a `.npy` file. `sums.bin` holds the CRC-32 of every block of every array, and `meta.json` describes the
arrays and holds the SHA-256 of `sums.bin` and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# What is verified at a time. A random read of a memory map takes about as much from the disk anyway.
BLOCK = 64 << 10
META = "meta.json"
SUMS = "sums.bin"
_HEADER = 128  # bytes of a .npy file before its values


class Damaged(Exception):
    """A file of a folder does not hold what was written; the text says which and how."""


class SealedArray:
    """A one-dimensional array, read through a memory map. Each block is verified when it is first read.

    Raises Damaged when its file is missing or has another size, and from reading when a block is not as written.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int, sums: np.ndarray) -> None:
        """sums: uint32, one for each block."""
        self._name = path.name
        wanted = _HEADER + length * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Damaged(f"{path.name} is missing or unreadable") from error
        if size != wanted:
            raise Damaged(f"{path.name} has {size:,} bytes and not {wanted:,}")
        # A map of no bytes is refused.
        self._values = np.memmap(path, dtype, "r", _HEADER, (length,)) if length else np.zeros(0, dtype)
        self._sums = sums
        self._verified = np.zeros(len(sums), np.bool_)

    def __getitem__(self, part: slice) -> np.ndarray:
        """A part with step 1, verified."""
        start, stop, _ = part.indices(len(self._values))
        size = self._values.itemsize
        first, end = start * size // BLOCK, -(-stop * size // BLOCK)
        if not self._verified[first:end].all():
            for block in range(first, end):
                self._verify(block)
        return self._values[part]

    def _verify(self, block: int) -> None:
        found = zlib.crc32(self._values.data.cast("B")[block * BLOCK : (block + 1) * BLOCK])
        if found != self._sums[block]:
            raise Damaged(f"{self._name} does not hold what was written near byte {_HEADER + block * BLOCK:,}")
        self._verified[block] = True


def open_sealed(folder: Path) -> tuple[dict[str, Any], dict[str, SealedArray]]:
    """What was written by `sealing` into `folder`: its facts, and its arrays by name.

    Raises Damaged for whatever can be told without reading the arrays.
    """
    try:
        meta = json.loads((folder / META).read_bytes())
        seal = meta.pop("sha256")
        if seal != _seal(meta):
            raise ValueError
    except OSError as error:
        raise Damaged(f"{META} is missing or unreadable") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{META} does not hold what was written") from error
    try:
        raw = (folder / SUMS).read_bytes()
    except OSError as error:
        raise Damaged(f"{SUMS} is missing or unreadable") from error
    if hashlib.sha256(raw).hexdigest() != meta["sums"]:
        raise Damaged(f"{SUMS} does not hold what was written")
    sums, first = np.frombuffer(raw, "<u4"), 0
    arrays: dict[str, SealedArray] = {}
    for name, (dtype, length) in meta["arrays"].items():
        end = first - (-length * np.dtype(dtype).itemsize // BLOCK)
        arrays[name] = SealedArray(folder / f"{name}.npy", np.dtype(dtype), length, sums[first:end])
        first = end
    return meta["facts"], arrays


Append = Callable[[ArrayLike], object]


@contextmanager
def sealing(folder: Path, dtypes: Mapping[str, type[np.generic]]) -> Iterator[tuple[dict[str, Append], dict[str, Any]]]:
    """Writes arrays into `folder`: gives what appends values to each, and a dict for facts of JSON values.

    All of it is on the disk when this is left without an error.
    """
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        growing = {name: _Growing(folder / f"{name}.npy", dtype, stack) for name, dtype in dtypes.items()}
        yield {name: array.append for name, array in growing.items()}, facts
        for array in growing.values():
            array.complete()
    sums = np.concatenate([array.sums() for array in growing.values()]).astype("<u4").tobytes()
    _write(folder / SUMS, sums)
    arrays = {name: (array.dtype.str, array.length) for name, array in growing.items()}
    meta = {"facts": facts, "arrays": arrays, "sums": hashlib.sha256(sums).hexdigest()}
    _write(folder / META, json.dumps(meta | {"sha256": _seal(meta)}, indent=1).encode())


def _seal(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        _settle(stream)


def _settle(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


class _Growing:
    """A one-dimensional `.npy` file to which values are appended."""

    def __init__(self, path: Path, dtype: type[np.generic], stack: ExitStack) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._stream = stack.enter_context(path.open("wb"))
        self._sums: list[int] = []
        self._open_sum, self._open_bytes = 0, 0  # of the block that is not full yet
        self._write_header()
        assert self._stream.tell() == _HEADER

    def append(self, values: ArrayLike) -> None:
        """Adds values, one-dimensional, behind those that are there."""
        added = np.asarray(values, self.dtype).tobytes()
        self.length += len(added) // self.dtype.itemsize
        self._stream.write(added)
        rest = memoryview(added)
        while rest:
            part, rest = rest[: BLOCK - self._open_bytes], rest[BLOCK - self._open_bytes :]
            self._open_sum = zlib.crc32(part, self._open_sum)
            self._open_bytes += len(part)
            if self._open_bytes == BLOCK:
                self._sums.append(self._open_sum)
                self._open_sum, self._open_bytes = 0, 0

    def complete(self) -> None:
        """Writes how long the array has become."""
        self._stream.seek(0)
        self._write_header()  # of the same size: numpy pads it so that the first axis can grow in place
        _settle(self._stream)

    def sums(self) -> np.ndarray:
        """The CRC-32 of each block, int64."""
        return np.array(self._sums + [self._open_sum] * bool(self._open_bytes), np.int64)

    def _write_header(self) -> None:
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._stream, facts)
