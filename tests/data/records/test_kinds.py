"""One set of records comes out of every kind of file, whole or compressed; damage is named with file and place."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.records import tables
from jaxllm.data.records.source import SourceConfig, read
from jaxllm.data.rows.store import open_or_build
from jaxllm.files.compressed import COMPRESSIONS

# Quotes, delimiters, line ends and non-ASCII in values.
VALUES = [{"prompt": f'say "{i}",\tplease', "completion": f"línea {i}\nand more\r\n"} for i in range(700)]
NESTED = [
    {"messages": [{"role": "user", "content": "hi"}], "n": 1},
    {
        "messages": [{"role": "tool", "content": "yo", "name": "f"}, {"role": "assistant", "content": ""}],
        "tools": ["f"],
    },
]


def write_delimited(path: Path, values: list[dict], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(values[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(values)


def as_table(values: list[dict]) -> pa.Table:
    names = dict.fromkeys(name for value in values for name in value)
    return pa.table({name: [value.get(name) for value in values] for name in names})


def write_arrow(path: Path, values: list[dict], new: Callable) -> None:
    table = as_table(values)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


WRITERS: dict[str, Callable[[Path, list[dict]], object]] = {
    ".jsonl": lambda path, values: path.write_text("".join(json.dumps(value) + "\n" for value in values)),
    ".ndjson": lambda path, values: path.write_text("\n".join(json.dumps(value) for value in values)),
    ".json": lambda path, values: path.write_text(json.dumps(values, indent=1)),
    ".csv": lambda path, values: write_delimited(path, values, ","),
    ".tsv": lambda path, values: write_delimited(path, values, "\t"),
    ".parquet": lambda path, values: pq.write_table(as_table(values), path, row_group_size=300),
    ".arrow": lambda path, values: write_arrow(path, values, pa.ipc.new_stream),
    ".file.arrow": lambda path, values: write_arrow(path, values, pa.ipc.new_file),
}


def compress(path: Path, compression: str) -> Path:
    """The file beside it with one of the suffixes `.gz` and `.zst`, in two parts put together, as `cat` does."""
    content, half = path.read_bytes(), path.stat().st_size // 2
    whole = path.with_name(path.name + compression)
    one = gzip.compress if compression == ".gz" else lambda part: pa.compress(part, codec="zstd", asbytes=True)
    whole.write_bytes(one(content[:half]) + one(content[half:]))
    return whole


def columns(path: Path, **options) -> list[dict]:
    return [dict(record.columns) for record in read(SourceConfig(path=str(path), **options))]


def message(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        columns(path, **options)
    return str(caught.value)


def reading(suffix: str) -> dict:
    """The options that a file of `WRITERS` needs: Python's csv writes TSV with quotes."""
    return {"quotes": True} if suffix == ".tsv" else {}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_gives_the_same_records(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, VALUES)
    options = reading(suffix)
    assert columns(path, **options) == VALUES
    fields = {"text": "completion"}
    assert columns(path, fields=fields, **options)[3] == {"prompt": 'say "3",\tplease', "text": VALUES[3]["completion"]}
    for compression in COMPRESSIONS:
        packed = compress(path, compression)
        assert packed.read_bytes() != path.read_bytes()
        assert columns(packed, **options) == VALUES


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".file.arrow"])
def test_nested_values(tmp_path: Path, suffix: str):
    """A columnar file gives every struct every key, null where there was none; they are left out again."""
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, NESTED)
    assert columns(path) == NESTED


@pytest.mark.parametrize("suffix", WRITERS)
def test_progress_is_in_bytes_of_the_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, VALUES)
    packed = [compress(path, compression) for compression in COMPRESSIONS]
    for file in (path, *packed):
        steps: list[int] = []
        assert sum(1 for _ in read(SourceConfig(path=str(file), **reading(suffix)), steps.append)) == len(VALUES)
        # Of a columnar file padding is passed over, and the end, up to 64 KiB of it, read twice.
        columnar = suffix.endswith((".parquet", ".arrow"))
        least, most = (0.99, 70_000) if columnar else (1, 0)
        assert least * file.stat().st_size <= sum(steps) <= file.stat().st_size + most


def test_origins(tmp_path: Path):
    """The place is one that an editor finds, or counts rows."""
    wanted = {".jsonl": "line 3", ".csv": "line 6", ".tsv": "line 6", ".json": "record 3", ".parquet": "row 3"}
    for suffix, place in wanted.items():
        path = tmp_path / f"a{suffix}"
        WRITERS[suffix](path, [{"text": "two\nlines"}, {"text": "and\ntwo"}, {"text": "one"}])
        for file in (path, compress(path, ".gz")):
            *_, last = read(SourceConfig(path=str(file), **reading(suffix)))
            assert last.origin == f"{file}, {place}"


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_compressed_file_that_was_cut(tmp_path: Path, compression: str, kept: float):
    WRITERS[".jsonl"](tmp_path / "a.jsonl", VALUES)
    path = compress(tmp_path / "a.jsonl", compression)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    said = message(path)
    assert f"{path}: the {COMPRESSIONS[compression]} data are damaged or cut short near byte" in said
    assert "download the file again" in said


def test_a_damaged_gzip_file(tmp_path: Path):
    WRITERS[".jsonl"](tmp_path / "a.jsonl", VALUES)
    path = compress(tmp_path / "a.jsonl", ".gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    assert "gzip data are damaged" in message(path) or "is not JSON" in message(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".file.arrow"])
def test_a_columnar_file_that_was_cut(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, VALUES)
    content = path.read_bytes()
    for kept in (0.1, 0.5, 0.95):
        path.write_bytes(content[: int(kept * len(content))])
        said = message(path)
        assert f"{path} is damaged or no whole {'Parquet' if suffix == '.parquet' else 'Arrow'} file" in said
        assert "copy or download it again" in said


def test_damage_in_the_middle_is_named_with_its_row(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(as_table(VALUES), path, row_group_size=100, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(5).column(0)
    content = bytearray(path.read_bytes())
    start = group.data_page_offset
    content[start + 40 : start + group.total_compressed_size] = bytes(group.total_compressed_size - 40)
    path.write_bytes(content)
    monkeypatch.setattr(tables, "ROWS", 100)
    assert "after row 500" in message(path)


TIMES = {
    "nanoseconds": pa.array([1700000000123456789, None], pa.timestamp("ns")),
    "an early year": pa.array([-63000000000000000, 1], pa.timestamp("us", tz="Mars/Phobos")),
    "a late day": pa.array([2**31 - 1, 1], pa.date32()),
    "a duration": pa.array([1234567, 1], pa.duration("ns")),
    "a time": pa.array([1234567, 1], pa.time64("ns")),
    "a decimal": pa.array(["1.50", None]).cast(pa.decimal128(20, 2)),
    "a map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.timestamp("ns"))),
    "bytes": pa.array([b"\xff", b""]),
    "words": pa.array(["a", None]).dictionary_encode(),
    "text that is none": pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers(), null_count=0),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_that_nobody_reads_is_never_converted(tmp_path: Path, byte_tokenizer, name: str, suffix: str):
    path = tmp_path / f"a{suffix}"
    table = pa.table({"said": ["a", "b"], "created": TIMES[name]})
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    source = SourceConfig(path=str(path), fields={"text": "said"})
    assert [record.columns["text"] for record in read(source)] == ["a", "b"]
    summary = open_or_build([source], byte_tokenizer, cache=tmp_path / "cache", progress=False).summary
    assert (summary.samples, list(summary.unread.values())) == (2, [["created"]])


def test_times_inside_of_a_column_that_is_read(tmp_path: Path):
    """Chats have them beside their messages; pandas writes nanoseconds, which Python's dates have not."""
    turn = pa.struct([("role", pa.string()), ("at", pa.timestamp("ns")), ("took", pa.list_(pa.duration("ns")))])
    values = [[{"role": "user", "at": 1700000000123456789, "took": [1]}], [{"role": "assistant", "at": None}]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": pa.array(values, pa.list_(turn))}), path)
    assert columns(path) == [{"messages": values[0]}, {"messages": [{"role": "assistant"}]}]


def test_a_value_that_is_no_text_is_named_with_its_row(tmp_path: Path, byte_tokenizer):
    path = tmp_path / "a.parquet"
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers(), null_count=0)
    pq.write_table(pa.table({"text": texts}), path)
    with pytest.raises(UserError, match=r"a.parquet, row 2: the column 'text' \(string\) cannot be read: .*0xff"):
        open_or_build([SourceConfig(path=str(path))], byte_tokenizer, cache=tmp_path)
    pq.write_table(pa.table({"text": TIMES["nanoseconds"]}), path)
    with pytest.raises(UserError, match=r"row 1: column 'text' must be a string, not 1700000000123456789"):
        open_or_build([SourceConfig(path=str(path))], byte_tokenizer, cache=tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_columns_of_one_name(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert f"{path}: two columns are called 'text'" in message(path)


CSV = {
    'text,n\n"a",1\n"b"\n': "line 3 has 1 values and not 2, one for each of the columns text, n",
    "text,n\na,1,2\n": "line 2 has 3 values",
    'text\n"a\nb"\n"c" d\n': "the row that begins in line 4 cannot be read: ',' expected after '\"'",
    'text\na\n"b\nc\n': "the row that begins in line 3 cannot be read: unexpected end of data",
    ",text\n0,a\n": "the name of column 1 is empty",
    "a,b,a\n1,2,3\n": "two columns are called 'a'",
}


@pytest.mark.parametrize("content", CSV)
def test_csv_that_is_wrong(tmp_path: Path, content: str):
    path = tmp_path / "a.csv"
    path.write_text(content)
    said = message(path)
    assert f"{path}" in said
    assert CSV[content] in said


def test_quotes_of_tsv_are_text(tmp_path: Path):
    """As in the TSV of IANA, GLUE and spreadsheets without text delimiters; CSV may be written so too."""
    path = tmp_path / "a.tsv"
    path.write_text('input\toutput\r\n"so be it\tA\r\n\nhe said "\t"C" \n""\t\n', newline="")
    assert columns(path) == [
        {"input": '"so be it', "output": "A"},
        {"input": 'he said "', "output": '"C" '},
        {"input": '""', "output": ""},
    ]
    path = tmp_path / "a.csv"
    path.write_text('input,output\n"so be it,A\nhe said ",C\n')
    assert columns(path) == [{"input": "so be it,A\nhe said ", "output": "C"}]
    assert columns(path, quotes=False) == [
        {"input": '"so be it', "output": "A"},
        {"input": 'he said "', "output": "C"},
    ]
    path.write_text('text\n"a" b\n')
    assert "set `quotes: false`" in message(path)


def test_a_tsv_that_may_be_quoted_is_said(tmp_path: Path):
    path = tmp_path / "a.tsv"
    path.write_text('input\toutput\n"a"\tb\n"c"\td\n')
    notes: list[str] = []
    assert sum(1 for _ in read(SourceConfig(path=str(path)), note=notes.append)) == 2
    assert notes == [
        f'{path}, line 2: the quotes around "a" are text to the model. If quotes enclose the values of the file set '
        "`quotes: true`"
    ]
    write_delimited(path, [{"input": "a\nb", "output": "c"}], "\t")
    assert "line 2 has 1 values and not 2" in message(path)
    assert "`quotes: true`" in message(path)
    path.write_text('"input"\t"output"\n"a"\t"b"\n')
    assert 'names the columns in quotes ("input", "output")' in message(path)
    assert columns(path, quotes=True) == [{"input": "a", "output": "b"}]
    WRITERS[".jsonl"](tmp_path / "a.jsonl", VALUES)
    assert "`quotes` is for .csv and .tsv files" in message(tmp_path / "a.jsonl", quotes=False)


def test_csv_without_a_line_of_names(tmp_path: Path, byte_tokenizer):
    path = tmp_path / "a.csv"
    path.write_text('3,"first, title",body\n\n4,b,c\n')
    names = ["label", "title", "text"]
    assert columns(path, columns=names) == [
        {"label": "3", "title": "first, title", "text": "body"},
        {"label": "4", "title": "b", "text": "c"},
    ]
    assert "not 2, one for each of the columns label, text" in message(path, columns=["label", "text"])
    with pytest.raises(UserError, match=r"fit no format.* If the file begins with a record, .* `columns: \[first"):
        open_or_build([SourceConfig(path=str(path))], byte_tokenizer, cache=tmp_path)
    WRITERS[".jsonl"](tmp_path / "a.jsonl", VALUES)
    assert "`columns` names those of .csv and .tsv files" in message(tmp_path / "a.jsonl", columns=names)


def test_a_long_value_of_a_csv(tmp_path: Path):
    """Python's csv refuses more than 128 KiB unless told."""
    path = tmp_path / "a.csv"
    WRITERS[".csv"](path, [{"text": "long " * 100_000}])
    assert len(columns(path)[0]["text"]) == 500_000


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        (
            "a.jsonl",
            gzip.compress(b'{"text": "a"}', mtime=0),
            "holds gzip data, which its name does not say; end its name with .gz",
        ),
        ("a.json", pa.compress(b"[]" * 99, codec="zstd", asbytes=True), "Zstandard data"),
        ("a.txt", b"PK\x03\x04...", "unpack it"),
        ("a.csv", b"PAR1....", "end its name with .parquet"),
        ("a.jsonl.gz", b'{"text": "a"}', "does not hold gzip data, as its name says"),
        ("a.jsonl.zst", gzip.compress(b'{"text": "a"}', mtime=0), "holds gzip data"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
        ("a.parquet", b'{"text": "a"}', "no whole Parquet file"),
        ("a.arrow", b'{"text": "a"}', "no whole Arrow file"),
    ],
)
def test_content_that_the_name_does_not_say(tmp_path: Path, name: str, content: bytes, remedy: str):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in message(tmp_path / name)
    assert remedy in message(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow", ".file.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str):
    """A file of 32 MB passes in a third of it; the Parquet file is one row group, the array of JSON one line."""
    values = [{"text": f"{i:08}" * 1024} for i in range(4000)]
    path = tmp_path / f"a{suffix}"
    writers = {
        ".json": lambda: path.write_text(json.dumps(values)),
        ".txt": lambda: path.write_text("\n--\n".join(value["text"] for value in values)),
        ".parquet": lambda: pq.write_table(
            as_table(values),
            path,
            compression="none",
            use_dictionary=False,
            write_batch_size=32,
            data_page_size=1 << 18,
        ),
    }
    writers.get(suffix, lambda: WRITERS[suffix](path, values))()
    config = SourceConfig(path=str(path), separator="\n--\n" if suffix == ".txt" else None)
    values.clear()
    assert path.stat().st_size > 32e6
    before, highest, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for record in read(config):
        assert record.columns["text"] == f"{count:08}" * 1024
        count += 1
        highest = max(highest, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert highest + peak < 32e6 / 3


def test_real_files(shared: Path):
    news = columns(shared / "data/ag_news/test.csv", columns=["label", "title", "text"])
    with (shared / "data/ag_news/test.csv").open(newline="", encoding="utf-8") as stream:
        assert [list(row.values()) for row in news] == list(csv.reader(stream))
    reviews = columns(shared / "data/sst2/dev.tsv", columns=["text", "label"])
    assert reviews[0] == {"text": "one long string of cliches", "label": "0"}
    assert len(reviews) == 872
    runs = columns(shared / "data/layouts/runs.csv")
    with open(shared / "data/layouts/runs.csv", newline="", encoding="utf-8") as stream:
        assert runs == list(csv.DictReader(stream))
