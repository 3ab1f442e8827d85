"""The token store: every sample of a data set, tokenized once into memory-mapped files in a cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxllm.core.compilation_cache import alone, cache_root
from jaxllm.core.errors import UserError
from jaxllm.data.records import content, duplicates, source
from jaxllm.data.records.source import Record, SourceConfig
from jaxllm.data.rows.sealed import META, Damaged, open_sealed, sealing
from jaxllm.data.text import formats, tokenize
from jaxllm.data.text.formats import FORMATS, Renderer
from jaxllm.data.text.segments import Rendered, Text, Tokens
from jaxllm.data.text.tokenize import NEVER, Encoded, Encoder, Sample
from jaxllm.files.compressed import Suffix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 5  # of the files' meaning; another version is another folder
BATCH_RECORDS = 4096  # records tokenized in one call …
BATCH_BYTES = 1 << 20  # … or fewer, once they take so many bytes of their file
MOST_COLUMNS = 8  # that are not read, by name
STALE_SECONDS = 24 * 3600.0  # a build that wrote nothing for so long was killed
KEY_DAY = date(2000, 1, 1)  # what chat templates are told for the key of a store, which is the same on every day

Note = Callable[[str], object]

_DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32,  # uint16 when the vocabulary fits
    "trained": np.bool_,
    "ends": np.int64,  # where each sample ends in `tokens`
    "first_trained": np.int64,
    "first_end": np.int64,
    "splittable": np.bool_,
    "file": np.int32,  # index into the files of all sources, one source after the other
    "record": np.int64,
    "content": np.uint64,  # a hash of what its record says
}


@dataclass
class Summary:
    """What a store holds.

    `untrained`, `torn`: samples left out because nothing in them is trained, or because they are not read exactly
    (see `segments.Text`); `torn_at` is where the first of these stands. `unended`: samples that do not
    train the end of a turn. `formats`: label of each source → its format, found or given. `unread`: label of each
    source → those columns of its records that its format does not read. `notes`: what else is to be said.
    """

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    untrained: int = 0
    torn: int = 0
    torn_at: str = ""
    unended: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    unread: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        formats = ", ".join(f"{path} as {name}{self._not_read(path)}" for path, name in self.formats.items())
        notes = (
            (self.untrained, "left out: nothing in them is trained"),
            (self.torn, f"left out: a trained turn begins or ends inside a token (first: {self.torn_at})"),
            (self.unended, "without the trained end of a turn"),
        )
        return (
            f"{self.samples:,} samples, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained ({formats})"
            + "".join(f"; {count:,} samples {what}" for count, what in notes if count)
        )

    def _not_read(self, path: str) -> str:
        columns = self.unread.get(path, [])
        named = ", ".join(repr(column)[1:-1] for column in columns[:MOST_COLUMNS])  # which may have any character
        more = f" and {len(columns) - MOST_COLUMNS} more" if len(columns) > MOST_COLUMNS else ""
        noun = "column" if len(columns) == 1 else "columns"
        return f" without the {noun} {named}{more}" if columns else ""


class Store:
    """A finished token store, read through memory maps, whose tokens are verified as they are read.

    Attributes:
        folder: where it is.
        key: its name without the day: the same for the same content, options and tokenizer.
        source_ends: int64 [sources], how many samples there are up to the last of each source.
        summary: counts and formats.
        lengths: int64 [n], the ids of each sample.
        first_trained: int64 [n], the place of each sample's first trained target; at least 1.
        first_end: int64 [n], the place of the first trained token that ends a turn or the text; −1 without one.
        splittable: bool [n], whether a sample longer than the window may be trained in pieces.
        content: uint64 [n], a hash of what the record of each sample says (see `duplicates.content_of`).
    """

    def __init__(self, folder: Path, key: str = "", labels: Sequence[str] = (), files: Sequence[str] = ()) -> None:
        """labels: what the sources are called now. files: where all their files are now, one source after the other.

        A store that is opened by its folder alone numbers its sources and files.
        Raises Damaged when the store is not as it was written, so far as is told without reading its tokens.
        """
        self.folder = folder
        self.key = key or folder.name
        facts, arrays = open_sealed(folder)
        counts = facts["summary"]
        labels = labels or [f"source {i}" for i in range(len(counts["formats"]))]
        self._files = files
        torn = counts["torn_at"]
        torn_at = source.describe_origin(self._file_name(torn[0]), torn[1]) if torn else ""
        of_sources = {name: dict(zip(labels, counts[name], strict=True)) for name in ("formats", "unread")}
        self.summary = Summary(**{**counts, "torn_at": torn_at, **of_sources})
        self.source_ends = np.array(facts["source_ends"], np.int64)
        self._tokens, self._trained = arrays["tokens"], arrays["trained"]
        self._ends = arrays["ends"][:]
        self._file, self._record = arrays["file"][:], arrays["record"][:]
        self.lengths = np.diff(self._ends, prepend=0)
        self.first_trained = arrays["first_trained"][:]
        self.first_end = arrays["first_end"][:]
        self.splittable = arrays["splittable"][:]
        self.content = arrays["content"][:]

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> Sample:
        """The ids and trained flags `start:stop` of sample `i`.

        Raises UserError when they are not what was written; the store is then built again at the next start.
        """
        length = int(self.lengths[i])
        begin = int(self._ends[i]) - length
        part = slice(begin + start, begin + (length if stop is None else min(stop, length)))
        try:
            return Sample(self._tokens[part].astype(np.int32), np.array(self._trained[part]))
        except Damaged as damage:
            raise self._given_up(damage) from damage

    def origin(self, i: int) -> tuple[str, int]:
        """The file of sample `i` and its record there, counted from 1 (see `source.Record`)."""
        return self._file_name(self._file[i]), int(self._record[i])

    def _file_name(self, number: int) -> str:
        return self._files[number] if self._files else f"file {number}"

    def places(self, files: Sequence[str]) -> np.ndarray:
        """int64 [n]: the record that each sample is of, the same for the same record in any source and store.

        files: real paths. A record of a file that is not among them has a place below 0.
        """
        number = {file: i for i, file in enumerate(files)}
        numbers = np.array([number.get(os.path.realpath(file), -1) for file in self._files], np.int64)
        of_file = numbers[self._file]
        return np.where(of_file < 0, -self._record, of_file << 40 | self._record)

    @cached_property
    def real_files(self) -> list[str]:
        """The real paths of the files, each once."""
        return list(dict.fromkeys(map(os.path.realpath, self._files)))

    @cached_property
    def groups(self) -> np.ndarray:
        """int64 [n]: numbers from 0 on, equal for samples of one record, and of records that say the same."""
        group = duplicates.numbered(self.content)
        if len(self.real_files) == len(self._files):
            return group  # what is of one record has the same content
        return duplicates.joined(group, duplicates.numbered(self.places(self.real_files)))

    @property
    def repeated(self) -> tuple[int, int]:
        """How many records say what an earlier one says, and how many there are."""
        records = 1 + int(((np.diff(self._file) != 0) | (np.diff(self._record) != 0)).sum())
        return records - len(np.unique(self.content)), records

    def _given_up(self, damage: Damaged) -> UserError:
        remedy = "The next start tokenizes the data again. If this happens again, check the disk and the memory"
        try:
            (self.folder / META).unlink(missing_ok=True)  # without it no process takes this for a store
        except OSError as error:
            remedy = f"Remove that folder, which this process may not ({error.strerror}), and start again"
        return UserError(f"the tokenized data in {self.folder} are damaged: {damage}. {remedy}")


@dataclass(frozen=True)
class Wanted:
    """The token store of some sources under a tokenizer, whether the cache has it or not; see `open_or_build`."""

    sources: Sequence[SourceConfig]
    tokenizer: PreTrainedTokenizerFast
    root: Path
    files: Sequence[Sequence[str]]
    """of each source"""
    hashes: Sequence[str]
    """of the content of all files, one source after the other"""
    key: str
    dated: bool
    """whether a chat template asks for the date"""

    @classmethod
    def of(
        cls,
        sources: Sequence[SourceConfig],
        tokenizer: PreTrainedTokenizerFast,
        cache: Path | None = None,
        *,
        progress: bool = True,
    ) -> Wanted:
        """Looks at the files, of which only those that are not known yet are read whole."""
        root = cache or cache_root()
        renderers, facts = zip(*(renderer_of(config, tokenizer, KEY_DAY) for config in sources), strict=True)
        files = [source.find_files(config) for config in sources]
        flat = [file for of_source in files for file in of_source]
        hashes = _hashes(flat, root, progress)
        held = iter(hashes)
        content_of = [[(*Suffix.of(file), next(held)) for file in of_source] for of_source in files]
        options = [source.reading_options(config) for config in sources]
        key = _digest(VERSION, options, content_of, tokenize.fingerprint(tokenizer), facts)
        return cls(sources, tokenizer, root, files, hashes, key, any(renderer.dated for renderer in renderers))

    def day(self) -> date:
        """The day of the newest store that the cache has, if the templates ask for it; otherwise today."""
        if self.dated:
            for folder in sorted((self.root / "tokens").glob(f"{self.key}-????-??-??"), reverse=True):
                with contextlib.suppress(ValueError):
                    return date.fromisoformat(folder.name.removeprefix(f"{self.key}-"))
        return date.today()

    def open(self, day: date, *, progress: bool = True, note: Note | None = None) -> Store:
        """The store whose chat templates were told that it is `day`."""
        folder = self.root / "tokens" / (f"{self.key}-{day}" if self.dated else self.key)
        try:
            return self._store(folder)
        except Damaged:
            pass  # or not there
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with alone(self.root / "locks" / f"{folder.name}.lock"):
                try:
                    return self._store(folder)  # another process was first
                except Damaged as damage:
                    if folder.exists():
                        said = f"the tokenized data in {folder} are damaged ({damage}) and are built again"
                        (note or _on_stderr)(said)
                _build(folder, self, day, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(
                f"cannot write the tokenized data under {self.root}: {error.strerror}. "
                "Free some space there or set JAXLLM_CACHE to another folder"
            ) from error
        return self._store(folder)

    def _store(self, folder: Path) -> Store:
        return Store(folder, self.key, [*map(source.label, self.sources)], [f for files in self.files for f in files])


def open_or_build(
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    *,
    day: date | None = None,
    cache: Path | None = None,
    progress: bool = True,
    note: Note | None = None,
) -> Store:
    """The store of `sources` under `tokenizer`; built unless the cache folder has it, as it was written.

    Its key covers the content of the files, their options, the tokenizer with its chat template, and the
    first record of each source as its format renders it. It does not cover where the files are. A store is built
    beside its place and renamed into it when whole, so that a killed build leaves no store; of two builders the second
    waits for the first. Memory does not grow with the number of records.

    Args:
        day: the date that chat templates are given. Default: the date of a store in the cache, otherwise today.
        cache: the folder, default `cache_root()`.
        note: what is told that a store is damaged and built again; default: the standard error.

    Raises UserError for bad data, when nothing is trained, and when the cache folder cannot be written or is full.
    """
    wanted = Wanted.of(sources, tokenizer, cache, progress=progress)
    return wanted.open(day or wanted.day(), progress=progress, note=note)


def _on_stderr(text: str) -> None:
    Console(stderr=True).print(text, soft_wrap=True)


def _hashes(files: Sequence[str], root: Path, progress: bool) -> list[str]:
    with _progress_bar(progress) as bar:
        task = bar.add_task("reading", total=sum(map(os.path.getsize, set(files))), visible=False)
        return content.hashes(files, root, lambda count: bar.update(task, advance=count, visible=True))


def renderer_of(config: SourceConfig, tokenizer: PreTrainedTokenizerFast, day: date) -> tuple[Renderer, list[object]]:
    """What makes samples of a source's records, and what its rendering follows from beside the source's options:
    the format, the chat template, and the first record as rendered."""
    record = next(source.read(config))
    detected = config.format == formats.AUTO
    try:
        name = formats.detect(record.columns) if detected else config.format
        renderer = Renderer(name, config, tokenizer, detected=detected, day=day)
    except UserError as error:
        raise UserError(f"{record.origin}: {error}{source.names_hint(config, record.file)}") from error
    first = [_facts(rendered) for _, rendered in _render(renderer, [record])]
    return renderer, [name, renderer.chat.text if FORMATS[name].chat and config.chat_template else None, first]


def _facts(rendered: Rendered) -> list[object]:
    if isinstance(rendered, Tokens):
        return [rendered.ids.tolist(), rendered.trained.tolist()]
    return [[segment.text, segment.trained] for segment in rendered.segments]


def _render(renderer: Renderer, records: Sequence[Record]) -> list[tuple[Record, Rendered]]:
    samples: list[tuple[Record, Rendered]] = []
    for record, found in zip(records, renderer.many([record.columns for record in records]), strict=False):
        if isinstance(found, UserError):
            raise UserError(f"{record.origin}: {found}") from found
        samples += [(record, sample) for sample in found]
    return samples


def _digest(*facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _build(folder: Path, wanted: Wanted, day: date, progress: bool) -> None:
    for other in folder.parent.glob("*.partial"):
        if _is_stale(other):
            shutil.rmtree(other, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's folders are private, and a cache may be shared
        _write(unfinished / "new", wanted, day, progress)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(unfinished / "damaged")
        try:
            (unfinished / "new").rename(folder)
        except OSError:
            if not folder.is_dir():  # another builder may have been first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_stale(partial: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # its builder may finish meanwhile
        written = max(file.stat().st_mtime for file in [partial, *partial.rglob("*")])
        return time.time() - written > STALE_SECONDS
    return False


def _write(folder: Path, wanted: Wanted, day: date, progress: bool) -> None:
    folder.mkdir()
    tokenizer = wanted.tokenizer
    encoder = Encoder(tokenizer)
    renderers = [renderer_of(config, tokenizer, day)[0] for config in wanted.sources]
    summary = Summary()
    flat = [file for of_source in wanted.files for file in of_source]
    source_ends: list[int] = []
    before_source = 0  # files
    small = max(tokenizer.get_vocab().values()) < 1 << 16
    dtypes = _DTYPES | ({"tokens": np.uint16} if small else {})
    with sealing(folder, dtypes) as (append, facts), _progress_bar(progress) as bar:
        task = bar.add_task("tokenizing", total=sum(map(os.path.getsize, flat)))
        torn_at: tuple[int, int] | None = None
        hashed, said = None, 0
        for config, render, files in zip(wanted.sources, renderers, wanted.files, strict=True):
            before, joined, example = replace(summary), 0, ""
            places = {file: before_source + i for i, file in enumerate(files)}
            before_source += len(files)
            for records in _batches(source.read(config, partial(bar.advance, task), summary.notes.append)):
                rendered = _render(render, records)
                encoded = encoder.encode([sample for _, sample in rendered])
                for (record, given), found in zip(rendered, encoded, strict=True):
                    if not _count(summary, record, given, found):
                        if summary.torn and torn_at is None:
                            torn_at = places[record.file], record.index
                        continue
                    if found.joined != NEVER:
                        joined += 1
                        example = example or _border(record, str(given), found.joined)
                    if record is not hashed:
                        hashed, said = record, duplicates.content_of(record.columns, FORMATS[render.name].reads)
                    ids, trained = found.sample
                    append["tokens"](ids)
                    append["trained"](trained)
                    append["ends"]([summary.tokens])
                    append["first_trained"]([1 + int(np.argmax(trained[1:]))])
                    append["first_end"]([found.end])
                    append["splittable"]([given.splittable])
                    append["file"]([places[record.file]])
                    append["record"]([record.index])
                    append["content"]([said])
            _check_trained(config, render.name, before, summary)
            if joined:
                summary.notes.append(_joined(config, joined, summary.samples - before.samples, example))
            source_ends.append(summary.samples)
        if content.hashes(flat, wanted.root) != wanted.hashes:
            raise UserError(
                "a data file has changed while it was tokenized; start again when nothing writes to the files of "
                + ", ".join(config.path for config in wanted.sources)
            )
        of_sources = {"formats": [r.name for r in renderers], "unread": [list(r.unread) for r in renderers]}
        counts = asdict(summary) | {"torn_at": torn_at} | of_sources
        facts |= {"summary": counts, "source_ends": source_ends}


def _joined(config: SourceConfig, count: int, samples: int, example: str) -> str:
    """What to say of samples whose prompt is read otherwise when it is asked alone."""
    return (
        f"{source.label(config)}: in {count:,} of {samples:,} samples the end of the prompt and the beginning of the "
        f"answer are read as one ({example}), so a model that is asked with the prompt alone gets other tokens than it "
        "was trained on. Move white space from the end of the prompt to the beginning of the answer, or end the "
        "prompt with a line end"
    )


def _border(record: Record, text: str, place: int) -> str:
    """Where the first answer of a sample begins, for people."""
    return f"{record.origin}: {text[max(place - 12, 0) : place]!r} and {text[place : place + 12]!r}"


def _count(summary: Summary, record: Record, given: Rendered, found: Encoded) -> bool:
    """Counts a sample in `summary`; whether it is kept."""
    trained = int(found.sample.trained[1:].sum())
    if not trained:
        summary.untrained += 1
    elif found.torn:
        summary.torn += 1
        summary.torn_at = summary.torn_at or record.origin
    else:
        summary.samples += 1
        summary.tokens += len(found.sample.ids)
        summary.trained_tokens += trained
        # Text that is trained whole may have no end: a piece of a longer one.
        summary.unended += found.end == NEVER and (isinstance(given, Text) or given.masked)
        return True
    return False


def _check_trained(config: SourceConfig, name: str, before: Summary, after: Summary) -> None:
    """Raises UserError unless the samples of a source, counted between two summaries, train something, and ends."""
    samples, torn = after.samples - before.samples, after.torn - before.torn
    if not samples and torn:
        raise UserError(
            f"nothing is trained in {config.path!r}: in each of {torn:,} samples, such as {after.torn_at}, a trained "
            "turn begins or ends inside a token, or the tokens before it are others when the model is asked for it. "
            "Use a chat template whose marks are special tokens of the tokenizer, or set `train_on: all`"
        )
    if not samples:
        raise UserError(
            f"nothing is trained in {config.path!r}: none of {after.untrained - before.untrained:,} samples has text "
            "to train on. Check `format` and `fields`"
        )
    if after.unended - before.unended == samples:
        raise UserError(
            f"the end of a turn is never trained in {config.path!r}, so the model would not learn to stop; "
            f"{FORMATS[name].stop}"
        )


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.size
        if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
