"""Records of columnar files, Parquet and Arrow: rows as Python values, some at a time.

Readers yield as those of `lines` do; the index is the row's.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from jaxllm.core.errors import UserError
from jaxllm.data.files import Suffix
from jaxllm.data.lines import Place

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


def _rows(batches: Iterator[pa.RecordBatch], file: str, what: str) -> Iterator[Place]:
    import pyarrow as pa

    index = 0
    try:
        for batch in batches:
            size = batch.nbytes // max(batch.num_rows, 1)
            for start in range(0, batch.num_rows, ROWS):
                for row in batch.slice(start, ROWS).to_pylist():
                    index += 1
                    yield index, {name: _without_nulls(value) for name, value in row.items()}, size
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
