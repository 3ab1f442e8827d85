"""Records of columnar files, Parquet and Arrow: rows whose columns become Python values as they are read.

Readers yield as those of `lines` do; the index is the row's.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from jaxllm.core.errors import UserError
from jaxllm.data.records.text_files import Place
from jaxllm.files.compressed import Suffix

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256  # made Python values at a time
ARROW_FILE = b"ARROW1"  # how a file begins that is no stream


def read_parquet(stream: io.BufferedReader, file: str) -> Iterator[Place]:
    """The rows of a Parquet file, read by row group, of which some rows at a time become Python values."""
    import pyarrow.parquet as pq

    def batches(table: Any) -> Iterator[pa.RecordBatch]:
        reader = pq.ParquetFile(table, pre_buffer=False, buffer_size=1 << 20)
        yield from reader.iter_batches(batch_size=ROWS)

    with _whole(stream, file) as table:
        yield from _rows(batches(table), file, "Parquet")


def read_arrow(stream: io.BufferedReader, file: str) -> Iterator[Place]:
    """The rows of an Arrow IPC file or stream (`datasets` writes streams), read by record batch."""
    import pyarrow as pa

    def batches(table: Any) -> Iterator[pa.RecordBatch]:
        is_file = table.read(len(ARROW_FILE)) == ARROW_FILE
        table.seek(0)
        if is_file:
            reader = pa.ipc.open_file(table)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(table)

    with _whole(stream, file) as table:
        yield from _rows(batches(table), file, "Arrow")


class Row(Mapping[str, Any]):
    """One row of a table, its nulls as None. A column becomes Python values when one of them is looked up."""

    def __init__(self, columns: Mapping[str, _Column], place: int) -> None:
        self._columns = columns
        self._place = place

    def __getitem__(self, name: str) -> Any:
        return self._columns[name].value(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def without(self, names: Container[str]) -> Row:
        """The row without the columns `names`, and without those that hold null."""
        kept = {
            name: column
            for name, column in self._columns.items()
            if name not in names and not column.is_null(self._place)
        }
        return Row(kept, self._place)


class _Column:
    """Some rows of a column."""

    def __init__(self, name: str, array: pa.Array) -> None:
        self._name = name
        self._array: Any = array
        self._is_valid: list[bool] | None = array.is_valid().to_pylist() if array.null_count else None
        self._values: list[Any] | None = None

    def is_null(self, place: int) -> bool:
        return self._is_valid is not None and not self._is_valid[place]

    def value(self, place: int) -> Any:
        """Raises UserError for a value that Python has not."""
        if self._values is None:
            self._values = self._convert()
        try:
            return _without_nulls(self._values[place] if self._values else self._array[place].as_py())
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the column {self._name!r} ({self._array.type}) cannot be read: {reason}") from error

    def _convert(self) -> list[Any]:
        """All values; empty if one of them cannot be read."""
        import pyarrow as pa

        try:
            return self._array.to_pylist()
        except _UNREADABLE:
            pass
        try:  # Python has no nanoseconds, no years before 1, and not the time zones of all systems
            return self._array.cast(_without_times(self._array.type)).to_pylist()
        except (*_UNREADABLE, pa.ArrowException):
            return []


_UNREADABLE = (ValueError, OverflowError, KeyError)  # what pyarrow raises for values that Python has not


def _without_times(kind: Any) -> Any:
    """The Arrow type `kind`, in which points in time and durations are whole numbers, of their own unit."""
    import pyarrow as pa

    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_without_times(kind.value_type))
    return kind


def _rows(batches: Iterator[pa.RecordBatch], file: str, what: str) -> Iterator[Place]:
    import pyarrow as pa

    index = 0
    try:
        for batch in batches:
            names = batch.schema.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{file}: two columns are called {twice!r}; rename or remove one of them")
            size = batch.nbytes // max(batch.num_rows, 1)
            for start in range(0, batch.num_rows, ROWS):
                part = batch.slice(start, ROWS)
                columns = {name: _Column(name, part.column(i)) for i, name in enumerate(names)}
                for place in range(part.num_rows):
                    index += 1
                    yield index, Row(columns, place), size
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the reader's
            raise
        place, reason = f" after row {index}" if index else "", " ".join(str(error).split())
        raise UserError(
            f"{file} is damaged or no whole {what} file{place} ({reason}), as after a copy that was cut short; copy or "
            "download it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that hold null: each struct of a column has every key that any of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _whole(stream: io.BufferedReader, file: str) -> Iterator[io.IOBase]:
    """The file of the stream, or if that is compressed a copy of its content on disk: Parquet is read from its end."""
    if Suffix.of(file).compression is None:
        yield cast(io.IOBase, stream.raw)  # whose buffer would read too much at every leap
        return
    with tempfile.TemporaryFile(buffering=1 << 20) as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.seek(0)
        yield cast(io.IOBase, copy)
