"""Records of data files: plain text, `.jsonl` (one object a line) and `.json` (an array of objects)."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.data.chat import RenderConfig
from jaxllm.data.template import AUTO, FORMATS

CHUNK = 1 << 24  # bytes read at a time from a text file that holds many documents


class RecordsConfig(RenderConfig):
    """How records become text."""

    format: str = AUTO
    """a name of `template.FORMATS`, or auto: told from the columns of the first record"""
    fields: dict[str, str] = Field(default_factory=dict)
    """our column name → the file's, such as {prompt: question, completion: answer}"""
    separator: str | None = Field(default=None, min_length=1)
    """what stands between the documents of one text file; without it a file is one document"""

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name != AUTO and name not in FORMATS:
            known = ", ".join([AUTO, *FORMATS])
            raise ValueError(f"unknown format {name!r}.{did_you_mean(name, FORMATS)} Known: {known}.")
        return name


class SourceConfig(RecordsConfig):
    """Where records come from, how they become text, and how much of them is trained on."""

    path: str = Field(min_length=1)
    """a file or a glob such as lib/**/*.py: .jsonl, .json, .txt, or with `format: text` any text"""
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """its share of the tokens, beside the weights of the other sources; default: every record once an epoch"""


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `columns` under our names, where it stands, and the bytes that it takes there.

    `index` counts from 1: lines of a `.jsonl`, places in the array of a `.json`, documents of a text.
    """

    file: str
    index: int
    columns: Mapping[str, Any]
    size: int

    @property
    def origin(self) -> str:
        return describe_origin(self.file, self.index)


def describe_origin(file: str, index: int) -> str:
    """Where a record stands, for people: `"train.jsonl, line 3"` or `"train.json, record 3"`."""
    return f"{file}, {'line' if file.endswith('.jsonl') else 'record'} {index}"


def find_files(config: SourceConfig) -> list[str]:
    """The files that `config.path` names, sorted. Raises UserError when there is none or one cannot be read."""
    path = os.path.expanduser(config.path)
    if os.path.isdir(path):
        raise UserError(f"data path {config.path!r} is a folder; name a file or a glob such as {path}/**/*.jsonl")
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    files = [file for file in found if os.path.isfile(file)]
    if not files:
        raise UserError(f"no data file matches {config.path!r} (looked from {os.getcwd()})")
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"data file {file!r} may not be read; change its permissions or leave it out of `path`")
    return files


def read(config: SourceConfig) -> Iterator[Record]:
    """Every record of a source: files in sorted order, records as they stand in the file.

    Lines and documents of white space alone are no records. Text, and `.jsonl` by the line, is streamed;
    a `.json` array is held in memory whole. Raises UserError for what cannot be read, naming file and place,
    and when there is no record at all.
    """
    files = find_files(config)
    found = False
    for file in files:
        for record in _reader(config, file)(config, file):
            found = True
            yield record
    if not found:
        what = f"the data file {files[0]!r} is" if len(files) == 1 else f"all {len(files)} files of {config.path!r} are"
        raise UserError(f"{what} empty: there is no record to train on")


def fingerprint(sources: Sequence[SourceConfig]) -> str:
    """A hash of the content of every file of `sources` and of all options that decide what is in a record."""
    digest = hashlib.blake2b(digest_size=16)
    for config in sources:
        digest.update(config.model_dump_json(exclude={"weight"}).encode())
        for file in find_files(config):
            digest.update(json.dumps(file).encode())
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _reader(config: SourceConfig, file: str):
    suffix = os.path.splitext(file)[1]
    reader = {".jsonl": _read_lines, ".json": _read_array, ".txt": _read_text}.get(suffix)
    if reader is None and config.format == "text":
        reader = _read_text
    if reader is None:
        raise UserError(
            f"data file {file!r}: the suffix {suffix!r} is none of .jsonl, .json, .txt; "
            "to read it as plain text set `format: text`"
        )
    if config.separator is not None and reader is not _read_text:
        raise UserError(f"data file {file!r}: `separator` is for text files; remove it")
    return reader


def _read_text(config: SourceConfig, file: str) -> Iterator[Record]:
    offset = 0
    for index, raw in enumerate(_documents(file, config.separator), 1):
        text = _decode(raw, file, offset)
        offset += len(raw) + len((config.separator or "").encode())
        if text and not text.isspace():
            yield Record(file, index, _rename({"text": text}, config.fields, file, index), len(raw))


def _documents(file: str, separator: str | None) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        if separator is None:
            yield stream.read()
            return
        rest = b""
        while chunk := stream.read(CHUNK):
            *documents, rest = (rest + chunk).split(separator.encode())
            yield from documents
        yield rest


def _read_lines(config: SourceConfig, file: str) -> Iterator[Record]:
    offset = 0
    with open(file, "rb") as stream:
        for index, raw in enumerate(stream, 1):
            line = _decode(raw, file, offset)
            offset += len(raw)
            if not line or line.isspace():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {index} is not JSON: {error.msg} at column {error.colno}") from None
            yield Record(file, index, _columns(value, config.fields, file, index), len(raw))


def _read_array(config: SourceConfig, file: str) -> Iterator[Record]:
    with open(file, "rb") as stream:
        text = _decode(stream.read(), file, 0)
    if not text or text.isspace():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}. "
            "If the file holds one object a line, name it .jsonl"
        ) from None
    if not isinstance(values, list):
        raise UserError(f"{file} holds one JSON {_json_type(values)}; an array of objects is needed")
    size = len(text) // max(len(values), 1)
    for index, value in enumerate(values, 1):
        yield Record(file, index, _columns(value, config.fields, file, index), size)


def _columns(value: Any, fields: Mapping[str, str], file: str, index: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        origin = describe_origin(file, index)
        raise UserError(f'{origin} is a JSON {_json_type(value)}; an object such as {{"text": …}} is needed')
    return _rename(value, fields, file, index)


def _rename(columns: dict[str, Any], fields: Mapping[str, str], file: str, index: int) -> dict[str, Any]:
    for ours, theirs in fields.items():
        if theirs not in columns:
            raise UserError(
                f"{describe_origin(file, index)} has no column {theirs!r}, to which `fields` maps {ours!r}."
                f"{did_you_mean(theirs, columns)} Found: {', '.join(columns)}."
            )
    mapped = set(fields.values())
    kept = {name: value for name, value in columns.items() if name not in mapped}
    return kept | {ours: columns[theirs] for ours, theirs in fields.items()}


def _decode(raw: bytes, file: str, offset: int) -> str:
    # A byte order mark is a note on the encoding, not text.
    encoding = "utf-8-sig" if offset == 0 else "utf-8"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        skipped = 3 if encoding == "utf-8-sig" and raw.startswith(b"\xef\xbb\xbf") else 0
        place = offset + skipped + error.start
        raise UserError(
            f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place}. "
            "Convert it to UTF-8, or leave it out of `path`"
        ) from None


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
