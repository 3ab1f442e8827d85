"""Data files: what their names say they hold, and their bytes, decompressed, with the place of what is damaged."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

from jaxllm.core.errors import UserError

Kind = Literal["jsonl", "json", "csv", "tsv", "text", "parquet", "arrow"]

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# How files begin whose content is another than their name says; the suffixes that they should have.
_BEGINNINGS = {
    b"\x1f\x8b": ("gzip", (".gz",)),
    b"\x28\xb5\x2f\xfd": ("Zstandard", (".zst",)),
    b"PK\x03\x04": ("zip", ()),
    b"PAR1": ("Parquet", (".parquet",)),
    b"ARROW1": ("Arrow", (".arrow",)),
}
_LFS_POINTER = b"version https://git-lfs"

BUFFER = 1 << 20  # bytes read at a time


class Suffix(NamedTuple):
    """The end of a file's name: `.jsonl.gz` is jsonl, compressed by gzip. None: not known, not compressed."""

    kind: Kind | None
    compression: str | None

    @classmethod
    def of(cls, file: str) -> "Suffix":
        stem, last = os.path.splitext(file)
        compression = COMPRESSIONS.get(last)
        return cls(SUFFIXES.get(os.path.splitext(stem)[1] if compression else last), compression)


def describe_place(file: str, index: int) -> str:
    """A place in a data file, counted from 1, for people: `"train.jsonl, line 3"` or `"train.json, record 3"`."""
    units: dict[Kind | None, str] = {"jsonl": "line", "csv": "line", "tsv": "line", "parquet": "row", "arrow": "row"}
    return f"{file}, {units.get(Suffix.of(file).kind, 'record')} {index}"


@contextmanager
def open_file(file: str, advance: Callable[[int], object]) -> Iterator[io.BufferedReader]:
    """The content of a data file, decompressed. `advance(n)` is called for every n bytes that are read from disk.

    Raises UserError, also while it is read, when the file is not what its name says, or when its compressed form is
    damaged or cut short.
    """
    compression = Suffix.of(file).compression
    _check_beginning(file)
    counted = _Counted(file, advance)
    with io.BufferedReader(counted, BUFFER) as stored:
        if compression is None:
            yield cast(io.BufferedReader, stored)
            return
        import pyarrow as pa

        try:
            with pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), compression) as stream:
                yield io.BufferedReader(cast(Any, stream), BUFFER)
        except OSError as error:
            if error.errno is not None:  # the disk's, not the decompressor's
                raise
            raise UserError(
                f"{file}: the {compression} data are damaged or cut short near byte {counted.position:,} of "
                f"{os.path.getsize(file):,} ({error}); copy or download the file again"
            ) from error


class _Counted(io.RawIOBase):
    """A file that says how many bytes are read from it."""

    def __init__(self, file: str, advance: Callable[[int], object]) -> None:
        self._file = io.FileIO(file)
        self._advance = advance
        self.position = 0  # of what was read last, known after closing too

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer)
        self.position = self._file.tell()
        self._advance(count)
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_beginning(file: str) -> None:
    with open(file, "rb") as stream:
        beginning = stream.read(32)
    if beginning.startswith(_LFS_POINTER):
        raise UserError(f"{file} is the pointer to a Git LFS file and not the file; fetch it with `git lfs pull`")
    for mark, (what, suffixes) in _BEGINNINGS.items():
        if beginning.startswith(mark) and not file.endswith(suffixes):
            named = " or ".join(suffixes)
            remedy = f"end its name with {named}" if named else "unpack it and name the files inside"
            raise UserError(f"{file} holds {what} data, which its name does not say; {remedy}")
    compressed = [mark for mark, (_, suffixes) in _BEGINNINGS.items() if file.endswith(suffixes)]
    compression = Suffix.of(file).compression
    if compression and beginning and not beginning.startswith(tuple(compressed)):
        raise UserError(f"{file} does not hold {compression} data, as its name says; name it as what it holds")


def decode(raw: bytes, file: str, offset: int) -> str:
    """The text of `raw`, which begins at `offset` of `file`. Raises UserError with the offset of a wrong byte."""
    # A byte order mark is a note on the encoding, not text.
    encoding = "utf-8-sig" if offset == 0 else "utf-8"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        skipped = 3 if encoding == "utf-8-sig" and raw.startswith(b"\xef\xbb\xbf") else 0
        raise not_utf8(file, error, offset + skipped) from None


def not_utf8(file: str, error: UnicodeDecodeError, offset: int) -> UserError:
    """What to say of bytes of `file`, from `offset` on, that are not UTF-8."""
    inside = " of the decompressed text" if Suffix.of(file).compression else ""
    return UserError(
        f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}{inside}. "
        "Convert it to UTF-8, or leave it out of `path`"
    )
