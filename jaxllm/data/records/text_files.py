"""Records of files of text: plain text, JSON, CSV and TSV. Only a text of one document is held in memory whole.

Each reader yields `(index, value, size)`: the place of a record, counted from 1; its columns, or whatever else stands
there; and the bytes that it takes, more or less.
"""

import codecs
import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxllm.core.errors import UserError
from jaxllm.data.records.json_text import JsonError, parse_json, parse_json_at
from jaxllm.files.compressed import decode, not_utf8

CHUNK = 1 << 20  # bytes read at a time from a file whose lines mean nothing

Place = tuple[int, Any, int]


class Separator:
    """What stands between the documents of a text file; `found` counts how often it did.

    A line end is one of Unix or of Windows. `\\n`, `\\r`, `\\t` and `\\\\`, as typed in a shell or in plain YAML, are
    the characters that they stand for.
    """

    def __init__(self, typed: str) -> None:
        self.text = re.sub(r"\\([nrt\\])", lambda match: _ESCAPES[match[1]], typed)
        lines = self.text.replace("\r\n", "\n").encode().split(b"\n")
        self._pattern = re.compile(rb"\r?\n".join(map(re.escape, lines)))
        self._most = sum(map(len, lines)) + 2 * (len(lines) - 1)  # bytes
        self.found = 0

    def split(self, stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
        """The offset and the bytes of each document."""
        held, offset = bytearray(), 0  # `held` begins at `offset`
        while chunk := stream.read(CHUNK):
            searched, done = max(0, len(held) - self._most), 0
            held += chunk
            for match in self._pattern.finditer(held, searched):
                self.found += 1
                yield offset + done, bytes(held[done : match.start()])
                done = match.end()
            del held[:done]
            offset += done
        yield offset, bytes(held)


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def read_text(stream: io.BufferedReader, file: str, separator: Separator | None) -> Iterator[Place]:
    """One record `{text}` a document; `separator` stands between them, None makes the file one document."""
    documents = [(0, stream.read())] if separator is None else separator.split(stream)
    for index, (offset, raw) in enumerate(documents, 1):
        text = decode(raw, file, offset)
        if text and not text.isspace():
            yield index, {"text": text}, len(raw)


def read_json_lines(stream: io.BufferedReader, file: str) -> Iterator[Place]:
    """One JSON value a line; the index is the line's."""
    for index, line in _lines(stream, file):
        if line.isspace():
            continue
        try:
            value = parse_json(line)
        except JsonError as error:
            place = (
                f" is not JSON: {error.what} at column {error.at + 1}" if error.at is not None else f": {error.what}"
            )
            raise UserError(f"{file}, line {index}{place}") from None
        yield index, value, len(line)


def _lines(stream: io.BufferedReader, file: str) -> Iterator[tuple[int, str]]:
    offset = 0
    for index, raw in enumerate(stream, 1):
        if line := decode(raw, file, offset):
            yield index, line
        offset += len(raw)


def read_json(stream: io.BufferedReader, file: str) -> Iterator[Place]:
    """The elements of an array; or of a file that begins with an object the objects, one a line."""
    if not stream.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        yield from _elements(_JsonText(stream, file))
        return
    try:
        for index, (_, value, size) in enumerate(read_json_lines(stream, file), 1):
            yield index, value, size
    except UserError as error:
        hint = "A .json file holds an array of objects, or begins with an object and holds one object a line"
        raise UserError(f"{error}. {hint}") from error


def _elements(text: "_JsonText") -> Iterator[Place]:
    if not text.peek():
        return
    if text.peek() != "[":
        raise text.error("an array of objects, or one object a line, is needed")
    text.skip()
    index = 0
    while text.peek() != "]":
        if index and text.peek() != ",":
            raise text.error("Expecting ',' or ']'")
        if index:
            text.skip()
            text.peek()
        index += 1
        yield index, *text.value()
    text.skip()
    if text.peek():
        raise text.error("the array has ended, and something follows")


class _JsonText:
    """JSON text of a stream, of which one value at a time is in memory; any but a number, which may be cut in two."""

    _WHITE = re.compile(r"[ \t\r\n]*")

    def __init__(self, stream: io.BufferedReader, file: str) -> None:
        self._stream = stream
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0  # what stands before is done with
        self._lines = 0  # line ends in the text that is no longer held …
        self._in_line = 0  # … and the characters behind the last of them
        self._read = 0  # bytes

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = self._WHITE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Goes past the character of `peek`."""
        self._at += 1

    def value(self) -> tuple[Any, int]:
        """The value that begins at the character of `peek`, and its length."""
        while True:
            try:
                value, end = parse_json_at(self._text, self._at)
                size, self._at = end - self._at, end
                return value, size
            except JsonError as error:
                if error.at is None:
                    raise UserError(f"{self._file}, the value that begins in line {self._line()}: {error}") from None
                # Where the text at hand ends, inside of a string or of a short word such as `true`.
                cut = error.what.startswith("Unterminated string") or error.at > len(self._text) - 8
                if not (cut and self._more()):
                    raise self.error(error.what, error.at) from None

    def error(self, what: str, at: int | None = None) -> UserError:
        """What is wrong at the character of `peek`, or at another."""
        at = self._at if at is None else at
        start = self._text.rfind("\n", 0, at)
        column = at - start + (self._in_line if start < 0 else 0)
        return UserError(f"{self._file}, line {self._line(at)} is not a JSON array: {what} at column {column}")

    def _line(self, at: int | None = None) -> int:
        return 1 + self._lines + self._text.count("\n", 0, self._at if at is None else at)

    def _more(self) -> bool:
        """Reads on, as much again as is held, so that a long value is not parsed too often. False at the end."""
        chunk = self._stream.read(max(CHUNK, len(self._text) - self._at))
        pending = len(self._decoder.getstate()[0])
        try:
            new = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise not_utf8(self._file, error, self._read - pending) from None
        if not chunk:
            return False
        if not self._read:
            new = new.removeprefix("\ufeff")
        self._read += len(chunk)
        self._lines += self._text.count("\n", 0, self._at)
        start = self._text.rfind("\n", 0, self._at)
        self._in_line = self._at - start - 1 if start >= 0 else self._in_line + self._at
        self._text, self._at = self._text[self._at :] + new, 0
        return True


def read_rows(
    stream: io.BufferedReader,
    file: str,
    delimiter: str,
    names: Sequence[str],
    quotes: bool,
    note: Callable[[str], object],
) -> Iterator[Place]:
    """The rows of a CSV or TSV file, whose values are strings; the index is the line where a row begins.

    names: of the columns; where there are none the first row names them. quotes: those around a value are no part of
    it, and delimiters and line ends between them are. note: gets what is to be said of the file. Raises UserError for a
    row that has not one value a name, and for quotes that do not close.
    """
    noted = quotes
    for line, row in _quoted_rows(stream, file, delimiter) if quotes else _plain_rows(stream, file, delimiter):
        if not names:
            names = _header(row, file, line, quotes)
            continue
        if len(row) != len(names):
            remedy = "" if quotes or not any('"' in value for value in row) else f". {_SET_QUOTES}"
            raise UserError(
                f"{file}, line {line} has {len(row)} values and not {len(names)}, one for each of the columns "
                f"{', '.join(names)}{remedy}"
            )
        if not noted and (value := next(filter(_is_quoted, row), None)) is not None:
            noted = True
            note(f"{file}, line {line}: the quotes around {_short(value)} are text to the model. {_SET_QUOTES}")
        yield line, dict(zip(names, row, strict=True)), sum(map(len, row)) + len(row)


_SET_QUOTES = "If quotes enclose the values of the file set `quotes: true`"


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == '"'


def _short(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:30]} … {value[-10:]}"


def _plain_rows(stream: io.BufferedReader, file: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for line, text in _lines(stream, file):
        if row := text.removesuffix("\n").removesuffix("\r"):
            yield line, row.split(delimiter)


def _quoted_rows(stream: io.BufferedReader, file: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # of the whole process, and 128 KiB by default
    rows = csv.reader((line for _, line in _lines(stream, file)), delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file}: the row that begins in line {line} cannot be read: {error}. A value that holds a quote, "
                "a line end or the delimiter stands in quotes, and quotes in it are doubled; if the file has no such "
                "quotes set `quotes: false`"
            ) from None
        if row:
            yield line, row


def _header(row: list[str], file: str, line: int, quotes: bool) -> list[str]:
    if not quotes and any(map(_is_quoted, row)):
        raise UserError(f"{file}, line {line} names the columns in quotes ({', '.join(row)}). {_SET_QUOTES}")
    problem = None
    if "" in row:
        problem = f"the name of column {row.index('') + 1} is empty"
    elif len(set(row)) < len(row):
        problem = f"two columns are called {next(name for name in row if row.count(name) > 1)!r}"
    if problem:
        raise UserError(
            f"{file}, line {line} should name the columns, and {problem}. Name them there; if the file has no such "
            "line, name its columns by `columns: [first, second, …]`"
        )
    return row
