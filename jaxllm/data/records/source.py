"""Records of data files: from a file, a glob, a folder or a data set of the Hub to one record after another."""

import contextlib
import fnmatch
import glob
import io
import os
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, field_validator

from jaxllm.core.config import OnResume
from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.data.records.saved import saved_files
from jaxllm.data.records.splits import README, Choice, choose
from jaxllm.data.records.tables import Row, read_arrow, read_parquet
from jaxllm.data.records.text_files import Place, Separator, read_json, read_json_lines, read_rows, read_text
from jaxllm.data.text.chat import RenderConfig
from jaxllm.data.text.formats import AUTO, FOREIGN_FORMATS, FORMATS
from jaxllm.files import hub, remote
from jaxllm.files.compressed import SUFFIXES, Suffix, describe_place, open_file
from jaxllm.files.file_systems import public


class RecordsConfig(RenderConfig):
    """Which records of a place are meant, and how they become text."""

    format: str = AUTO
    """a name of `template.FORMATS`, or auto: told from the columns of the first record"""
    fields: dict[str, str] = Field(default_factory=dict)
    """our column name → the file's, such as {prompt: question, completion: answer}; dots lead into objects and lists,
    such as {messages: data.conversation, completion: answers.text.0}"""
    columns: list[str] | None = Field(default=None, min_length=1)
    """the names of the columns of CSV or TSV files that have no line of names"""
    quotes: bool | None = None
    """whether quotes enclose values of CSV or TSV files, so that these may hold delimiters and line ends; false: quotes
    are text. Default: true for CSV, false for TSV"""
    separator: str | None = Field(default=None, min_length=1)
    """what stands between the documents of one text file, such as \\n###\\n, where \\n is a line end; without it a file
    is one document"""
    split: str | None = None
    """of a folder or a Hub data set; default: train, where there is more than one"""
    subset: str | None = None
    """of a Hub data set that has several (its "config"), or a folder in a folder"""

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name != AUTO and name not in FORMATS:
            known = ", ".join([AUTO, *FORMATS])
            ours = FOREIGN_FORMATS.get(name)
            hint = f" It is called {ours!r} here." if ours else did_you_mean(name, FORMATS)
            raise ValueError(f"unknown format {name!r}.{hint} Known: {known}.")
        return name


class SourceConfig(RecordsConfig):
    """Where records come from, how they become text, and how much of them is trained on."""

    path: Annotated[str, OnResume.NOTED] = Field(min_length=1)  # what the files hold is compared
    """a file, a glob such as lib/**/*.py, a folder, or a data set of the Hub: owner/name[@revision], or
    hf://datasets/owner/name[@revision][/file or glob]; or the URL of a file, a glob or a folder, such as
    s3://bucket/folder/*.jsonl. Files are .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt,
    also compressed as .gz or .zst; with `format: text` any text"""
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """its share of an epoch's tokens, relative to the weights of the other sources, which then all need one; 0 leaves
    it out. An epoch has as many tokens as all the sources together: a source smaller than its share is repeated, a
    larger one goes on in the next epoch. Default: an epoch is every record once"""


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `columns` under our names, where it stands, and the bytes that it takes there.

    `index` counts from 1: lines of `.jsonl`, `.csv` and `.tsv` (of a row its first), rows of `.parquet` and `.arrow`,
    places in a `.json`, documents of a text.
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
    return describe_place(hub.shown(file), index)


def find_files(config: SourceConfig) -> list[str]:
    """The files that `config.path` names, sorted; those elsewhere are downloaded unless they are in the cache.

    Raises UserError when there is none, one cannot be read, or it is open which files of a folder are meant.
    """
    if remote.is_url(config.path):
        return _remote_files(config)
    path = os.path.expanduser(config.path)
    if os.path.isdir(path):
        return _readable(_files_of_folder(Path(path), config))
    found = [path] if os.path.exists(path) else _glob(path)
    files = _each_once(file for file in found if os.path.isfile(file))
    if not files and (name := _hub_name(config.path)) is not None:
        return _readable(_files_of_hub(name, config))
    if not files:
        raise UserError(f"no data file matches {config.path!r} (looked from {os.getcwd()})")
    _refuse_choice(config, "one file or a glob")
    return _readable(files)


def _glob(pattern: str) -> Iterator[str]:
    """What `pattern` names, as `glob.glob` has it, but that `**` does not follow a link to a folder that it is in."""
    deep = re.search(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern)
    if deep is None:
        yield from glob.glob(pattern)
        return
    before, after = pattern[: deep.start()], pattern[deep.end() :] or "*"
    for root in glob.glob(before) if before else [""]:
        for folder in _folders(root, frozenset()):
            yield from _glob(os.path.join(glob.escape(folder), after))


def _folders(folder: str, above: frozenset[str]) -> Iterator[str]:
    """A folder and all below it but hidden ones. Links are followed, except to a folder that the link is in, by its
    real path or by one of the links `above`."""
    yield folder
    real = os.path.realpath(folder or os.curdir)
    above |= {real, *map(str, Path(real).parents)}
    with contextlib.suppress(OSError), os.scandir(folder or os.curdir) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for path in (os.path.join(folder, name) for name in names):
            if os.path.realpath(path) not in above:
                yield from _folders(path, above)


def _each_once(files: Iterable[str]) -> list[str]:
    """The files sorted, each under one of its names: the one that goes through the fewest folders."""
    names: dict[str, str] = {}
    for file in sorted(files, key=lambda file: (file.count(os.sep), file)):
        names.setdefault(os.path.realpath(file), file)
    return sorted(names.values())


def _readable(files: list[str]) -> list[str]:
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"data file {file!r} may not be read; change its permissions or leave it out of `path`")
    return files


def _refuse_choice(config: SourceConfig, what: str) -> None:
    for key in ("split", "subset"):
        if getattr(config, key) is not None:
            raise UserError(f"data path {config.path!r} is {what}, which has no {key}; remove `{key}`")


def _hub_name(path: str) -> hub.HubName | None:
    is_file = Suffix.of(path).kind is not None and not path.startswith("hf://")
    return None if is_file else hub.HubName.parse(path, "dataset")


def _files_of_folder(folder: Path, config: SourceConfig) -> list[str]:
    wanted = Choice(f"the folder {config.path}", config.split, config.subset)
    if (saved := saved_files(folder, wanted)) is not None:
        return saved
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    readme = folder / README
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return _each_once(str(folder / name) for name in choose(names, text, wanted))


def _files_of_hub(name: hub.HubName, config: SourceConfig) -> list[str]:
    def of_all(names: Sequence[str], text: Callable[[str], str]) -> list[str]:
        return choose(names, text(README), Choice(str(name), config.split, config.subset))

    def of_pattern(names: Sequence[str], text: Callable[[str], str]) -> list[str]:
        inside = [file for file in names if fnmatch.fnmatchcase(file, name.inside)]
        if not inside:
            raise UserError(f"{name} has no file {name.inside!r}.{did_you_mean(name.inside, names)}")
        return inside

    if name.inside:
        _refuse_choice(config, "one file or a glob")
    folder, files = hub.fetch(name, of_pattern if name.inside else of_all)
    return [str(folder / file) for file in files]


def _remote_files(config: SourceConfig) -> list[str]:
    is_folder, files = remote.find(config.path)
    if not is_folder:
        _refuse_choice(config, "one file or a glob")
        return [str(copy) for copy in remote.copy(list(files.values()))]
    readme = remote.copy([files[README]])[0].read_text(encoding="utf-8", errors="replace") if README in files else ""
    names = choose(files, readme, Choice(f"the folder {public(config.path)}", config.split, config.subset))
    return [str(copy) for copy in remote.copy([files[name] for name in names])]


def label(config: SourceConfig) -> str:
    """What a source is called: its path, with its subset and split where they are given."""
    return " ".join(filter(None, (config.path, config.subset, config.split)))


def names_hint(config: SourceConfig, file: str) -> str:
    """What to add to a message about unfit columns of `file`, where these may be a first record."""
    if config.columns is not None or Suffix.of(file).kind not in ("csv", "tsv"):
        return ""
    return " If the file begins with a record, and not with the names, give those by `columns: [first, second, …]`."


def read(
    config: SourceConfig,
    advance: Callable[[int], object] = lambda _: None,
    note: Callable[[str], object] = lambda _: None,
) -> Iterator[Record]:
    """Every record of a source: files in sorted order, records as they stand in the file.

    Lines and documents of white space alone are no records. All but a text of one document is streamed.
    `advance(n)` is called for every n bytes that are read from disk, `note(text)` with what is to be said of the files.
    Raises UserError for what cannot be read, naming file and place, and when there is no record at all.
    """
    files = find_files(config)
    found = False
    separator = None if config.separator is None else Separator(config.separator)
    for file in files:
        for index, value, size in _places(_reader(config, file, separator, note), file, advance):
            found = True
            yield Record(file, index, _columns(value, config.fields, file, index), size)
    if not found:
        what = f"the data file {files[0]!r} is" if len(files) == 1 else f"all {len(files)} files of {config.path!r} are"
        raise UserError(f"{what} empty: there is no record to train on")
    if separator is not None:
        where = files[0] if len(files) == 1 else f"the {len(files)} files of {config.path}"
        missing = "" if separator.found else ", so each file is one document"
        note(f"the separator {separator.text!r} stands {separator.found:,} times in {where}{missing}")


def reading_options(config: SourceConfig) -> dict[str, Any]:
    """The options that decide what is in a record of given files, and what of it is trained.

    The text of a chat template counts, and not the name of its file.
    """
    return config.model_dump(mode="json", exclude={"path", "split", "subset", "weight", "chat_template"})


Reader = Callable[[io.BufferedReader, str], Iterator[Place]]


def _places(reader: Reader, file: str, advance: Callable[[int], object]) -> Iterator[Place]:
    """What `reader` makes of a file. Whatever Python or the disk cannot read becomes a UserError with its place."""
    index = 0
    try:
        with open_file(file, advance) as stream:
            for place in reader(stream, file):
                index = place[0]
                yield place
    except (OSError, RecursionError, OverflowError, UnicodeError) as error:
        where = f"{describe_origin(file, index)}: what follows" if index else hub.shown(file)
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{where} cannot be read ({reason})") from error


def _reader(config: SourceConfig, file: str, separator: Separator | None, note: Callable[[str], object]) -> Reader:
    kind = Suffix.of(file).kind or ("text" if config.format == "text" else None)
    if kind is None:
        raise UserError(
            f"data file {file!r}: its suffix is none of {', '.join(SUFFIXES)}, nor one of these and .gz or .zst; "
            "to read it as plain text set `format: text`"
        )
    if config.separator is not None and kind != "text":
        raise UserError(f"data file {file!r}: `separator` is for text files; remove it")
    if config.columns is not None and kind not in ("csv", "tsv"):
        raise UserError(f"data file {file!r}: `columns` names those of .csv and .tsv files; rename others by `fields`")
    if config.quotes is not None and kind not in ("csv", "tsv"):
        raise UserError(f"data file {file!r}: `quotes` is for .csv and .tsv files; remove it")

    def rows(delimiter: str, quotes: bool) -> Reader:
        quotes = quotes if config.quotes is None else config.quotes
        return lambda stream, file: read_rows(stream, file, delimiter, config.columns or (), quotes, note)

    readers: dict[str, Reader] = {
        "text": lambda stream, file: read_text(stream, file, separator),
        "jsonl": read_json_lines,
        "json": read_json,
        "csv": rows(",", quotes=True),
        "tsv": rows("\t", quotes=False),
        "parquet": read_parquet,
        "arrow": read_arrow,
    }
    return readers[kind]


def _columns(value: Any, fields: Mapping[str, str], file: str, index: int) -> Mapping[str, Any]:
    """The columns of a record under our names; one that holds null is as if it were not there."""
    if not isinstance(value, dict | Row):
        origin = describe_origin(file, index)
        raise UserError(f'{origin} is a JSON {_json_type(value)}; an object such as {{"text": …}} is needed')
    mapped = {ours: _look_up(value, theirs, ours, file, index) for ours, theirs in fields.items()}
    mapped = {name: inner for name, inner in mapped.items() if inner is not None}
    taken = {*fields, *fields.values()}
    if isinstance(value, Row):  # whose other columns are not to be read
        return ChainMap(mapped, cast(Any, value.without(taken)))
    return {name: inner for name, inner in value.items() if inner is not None and name not in taken} | mapped


def _look_up(columns: Mapping[str, Any], name: str, ours: str, file: str, index: int) -> Any:
    """What `columns` has under `name`, in which dots lead into objects and lists."""
    if name in columns:
        return columns[name]
    value: Any = columns
    for key in name.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise UserError(
                f"{describe_origin(file, index)} has no column {name!r}, to which `fields` maps {ours!r}."
                f"{did_you_mean(name, columns)} Found: {', '.join(columns)}."
            )
    return value


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
