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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxllm.core.cache import cache_root
from jaxllm.core.errors import UserError
from jaxllm.data import source, template, tokenize
from jaxllm.data.segments import Rendered, Text, Tokens
from jaxllm.data.source import Record, SourceConfig
from jaxllm.data.template import FORMATS, Renderer
from jaxllm.data.tokenize import NEVER, Encoded, Encoder, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 3  # of the files' meaning; another version is another folder
BATCH_RECORDS = 4096  # records tokenized in one call …
BATCH_BYTES = 1 << 20  # … or fewer, once they take so many bytes of their file
MOST_COLUMNS = 8  # that are not read, by name
STALE_SECONDS = 24 * 3600.0  # a build that wrote nothing for so long was killed

_DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32,  # uint16 when the vocabulary fits
    "trained": np.bool_,
    "ends": np.int64,  # where each sample ends in `tokens`
    "first_trained": np.int64,
    "first_end": np.int64,
    "splittable": np.bool_,
    "file": np.int32,  # index into the list of files of meta.json
    "record": np.int64,
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
        return f" without the columns {named}{more}" if columns else ""


class Store:
    """A finished token store, read through memory maps.

    Attributes:
        folder: where it is.
        source_ends: int64 [sources], how many samples there are up to the last of each source.
        summary: counts and formats.
        lengths: int64 [n], the ids of each sample.
        first_trained: int64 [n], the place of each sample's first trained target; at least 1.
        first_end: int64 [n], the place of the first trained token that ends a turn or the text; −1 without one.
        splittable: bool [n], whether a sample longer than the window may be trained in pieces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        self.summary = Summary(**meta["summary"])
        self._files: list[str] = meta["files"]
        self.source_ends = np.array(meta["source_ends"], np.int64)
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _DTYPES}
        self._tokens, self._trained, self._ends = arrays["tokens"], arrays["trained"], arrays["ends"]
        self._file, self._record = arrays["file"], arrays["record"]
        self.lengths = np.diff(self._ends, prepend=0)
        self.first_trained = np.asarray(arrays["first_trained"])
        self.first_end = np.asarray(arrays["first_end"])
        self.splittable = np.asarray(arrays["splittable"])

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> Sample:
        """The ids and trained flags `start:stop` of sample `i`."""
        length = int(self.lengths[i])
        begin = int(self._ends[i]) - length
        part = slice(begin + start, begin + (length if stop is None else min(stop, length)))
        return Sample(self._tokens[part].astype(np.int32), np.array(self._trained[part]))

    def origin(self, i: int) -> tuple[str, int]:
        """The file of sample `i` and its record there, counted from 1 (see `source.Record`)."""
        return self._files[self._file[i]], int(self._record[i])


def open_or_build(
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> Store:
    """The store of `sources` under `tokenizer`; built unless the cache folder has it.

    Its key covers the content of the files, their options, the tokenizer with its chat template, and the
    first record of each source as its format renders it. A store is built beside its place and renamed into
    it when whole, so that a killed build leaves no store; of two builders the second waits for the first. Memory does
    not grow with the number of records. Raises UserError for bad data, when nothing is
    trained, and when the cache folder cannot be written or is full.
    """
    root = cache or cache_root()
    renderers, facts = zip(*(_renderer(config, tokenizer) for config in sources), strict=True)
    key = _digest(VERSION, source.fingerprint(sources), tokenize.fingerprint(tokenizer), facts)
    folder = root / "tokens" / key
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _one_builder(root / "locks" / f"{key}.lock"):
                if not folder.is_dir():
                    _build(folder, sources, renderers, tokenizer, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(
                f"cannot write the tokenized data under {root}: {error.strerror}. "
                "Free some space there or set JAXLLM_CACHE to another folder"
            ) from error
    return Store(folder)


@contextlib.contextmanager
def _one_builder(lock: Path) -> Iterator[None]:
    """Of several processes that want the same store one builds it, and the others wait for it."""
    lock.parent.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(NotImplementedError):  # a network disk without locks: each builds, and one wins
            held.enter_context(filelock.FileLock(lock))
        yield


def _renderer(config: SourceConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Renderer, list[object]]:
    """What makes samples of a source's records, and what its rendering follows from beside the source's options:
    the format, the chat template, and the first record as rendered."""
    record = next(source.read(config))
    detected = config.format == template.AUTO
    try:
        name = template.detect(record.columns) if detected else config.format
        renderer = Renderer(name, config, tokenizer, detected=detected)
    except UserError as error:
        raise UserError(f"{record.origin}: {error}{source.names_hint(config, record.file)}") from error
    first = [_facts(rendered) for rendered in _render(renderer, record)]
    return renderer, [name, renderer.chat.text if FORMATS[name].chat and config.chat_template else None, first]


def _facts(rendered: Rendered) -> list[object]:
    if isinstance(rendered, Tokens):
        return [rendered.ids.tolist(), rendered.trained.tolist()]
    return [[segment.text, segment.trained] for segment in rendered.segments]


def _render(renderer: Renderer, record: Record) -> list[Rendered]:
    try:
        return renderer(record.columns)
    except UserError as error:
        raise UserError(f"{record.origin}: {error}") from error
    except (RecursionError, OverflowError, UnicodeError) as error:
        raise UserError(f"{record.origin} cannot be rendered ({type(error).__name__}: {error})") from error


def _digest(*facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _build(
    folder: Path,
    sources: Sequence[SourceConfig],
    renderers: Sequence[Renderer],
    tokenizer: PreTrainedTokenizerFast,
    progress: bool,
) -> None:
    for other in folder.parent.glob("*.partial"):
        if _is_stale(other):
            shutil.rmtree(other, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's folders are private, and a cache may be shared
        _write(unfinished, sources, renderers, tokenizer, progress)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another builder may have been first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_stale(partial: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # its builder may finish meanwhile
        written = max(file.stat().st_mtime for file in [partial, *partial.iterdir()])
        return time.time() - written > STALE_SECONDS
    return False


def _write(
    folder: Path,
    sources: Sequence[SourceConfig],
    renderers: Sequence[Renderer],
    tokenizer: PreTrainedTokenizerFast,
    progress: bool,
) -> None:
    encoder = Encoder(tokenizer)
    summary = Summary(formats={source.label(config): r.name for config, r in zip(sources, renderers, strict=True)})
    files: dict[str, int] = {}
    source_ends: list[int] = []
    small = max(tokenizer.get_vocab().values()) < 1 << 16
    with contextlib.ExitStack() as stack:
        append = {
            name: stack.enter_context(_growing_array(folder / f"{name}.npy", dtype))
            for name, dtype in (_DTYPES | ({"tokens": np.uint16} if small else {})).items()
        }
        bar = stack.enter_context(_progress_bar(progress))
        size = sum(os.path.getsize(file) for config in sources for file in source.find_files(config))
        task = bar.add_task("tokenizing", total=size)
        for config, render in zip(sources, renderers, strict=True):
            before = replace(summary)
            for records in _batches(source.read(config, partial(bar.advance, task), summary.notes.append)):
                rendered = [(record, sample) for record in records for sample in _render(render, record)]
                encoded = encoder.encode([sample for _, sample in rendered])
                for (record, given), found in zip(rendered, encoded, strict=True):
                    if not _count(summary, record, given, found):
                        continue
                    ids, trained = found.sample
                    append["tokens"](ids)
                    append["trained"](trained)
                    append["ends"]([summary.tokens])
                    append["first_trained"]([1 + int(np.argmax(trained[1:]))])
                    append["first_end"]([found.end])
                    append["splittable"]([given.splittable])
                    append["file"]([files.setdefault(record.file, len(files))])
                    append["record"]([record.index])
            if render.unread:
                summary.unread[source.label(config)] = list(render.unread)
            _check_trained(config, render.name, before, summary)
            source_ends.append(summary.samples)
    meta = {"summary": asdict(summary), "files": list(files), "source_ends": source_ends}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


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


@contextlib.contextmanager
def _growing_array(path: Path, dtype: type[np.generic]) -> Iterator[Callable[[ArrayLike], object]]:
    """Opens a one-dimensional `.npy` file for appending values; on leaving it is complete."""
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0,)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, facts)
        start = stream.tell()
        yield lambda values: stream.write(np.asarray(values, dtype).tobytes())
        length = (stream.tell() - start) // np.dtype(dtype).itemsize
        # numpy pads the header so that the first axis can grow in place: it has the same size again.
        stream.seek(0)
        np.lib.format.write_array_header_1_0(stream, facts | {"shape": (length,)})


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
