"""Records come out of files as they stand there, and every unreadable file is named with the place."""

import glob
import gzip
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from jaxllm.core.errors import UserError
from jaxllm.data.records import source, text_files
from jaxllm.data.records.source import SourceConfig, read


def records(path: Path | str, **options) -> list[tuple[int, dict]]:
    return [(record.index, dict(record.columns)) for record in read(SourceConfig(path=str(path), **options))]


def message(path: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        records(path, **options)
    return str(caught.value)


def test_a_text_file_is_one_document(tmp_path: Path):
    text = "  a\r\nb\t é\n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert records(path) == [(1, {"text": text})]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_a_separator_divides_documents_wherever_the_chunks_end(tmp_path: Path, monkeypatch, chunk: int):
    path = tmp_path / "a.txt"
    path.write_text("one<|end|>\ntwö\n<|end|>\n <|end|>three<|end")
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    found = records(path, separator="<|end|>")
    # The third document is white space alone: no record, but it counts.
    assert found == [(1, {"text": "one"}), (2, {"text": "\ntwö\n"}), (4, {"text": "three<|end"})]


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
@pytest.mark.parametrize("typed", ["\n##\n", r"\n##\n", "\r\n##\r\n", r"\r\n##\n"])
def test_line_ends_of_a_separator_are_of_both_kinds(tmp_path: Path, monkeypatch, chunk: int, typed: str):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n##\r\ntwo\r\n\r\nends\n##\r\nthree\xf0")
    with pytest.raises(UserError, match="0xf0 at offset 30"):
        records(path, separator=typed)
    path.write_bytes(path.read_bytes()[:-1])
    assert records(path, separator=typed) == [
        (1, {"text": "one"}),
        (2, {"text": "two\r\n\r\nends"}),
        (3, {"text": "three"}),
    ]


def test_a_separator_may_be_typed_in_a_shell(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a\tb\\nc\nd")
    assert [columns["text"] for _, columns in records(path, separator=r"\n")] == ["a\tb\\nc", "d"]
    assert [columns["text"] for _, columns in records(path, separator=r"\t")] == ["a", "b\\nc\nd"]
    assert [columns["text"] for _, columns in records(path, separator=r"\\n")] == ["a\tb", "c\nd"]


def test_how_often_a_separator_is_found_is_said(tmp_path: Path):
    def notes(path: Path, separator: str) -> list[str]:
        said: list[str] = []
        for _ in read(SourceConfig(path=str(path), separator=separator), note=said.append):
            pass
        return said

    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one##two\n##")
    path = tmp_path / "a.txt"
    assert notes(path, "##") == [f"the separator '##' stands 2 times in {path}"]
    assert notes(path, r"##\n") == [f"the separator '##\\n' stands 0 times in {path}, so each file is one document"]
    assert notes(tmp_path / "*.txt", "##") == [f"the separator '##' stands 4 times in the 2 files of {tmp_path}/*.txt"]


def test_lines_keep_their_numbers(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b\\n"}')
    assert records(path) == [(1, {"text": "a"}), (3, {"text": "b\n"})]


def test_arrays_count_from_one(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": "b"}]')
    assert records(path) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_a_glob_reads_files_in_sorted_order_and_passes_over_empty_ones(tmp_path: Path):
    for name, text in {"b.py": "2", "sub/a.py": "3", "a.py": "1", "empty.py": "", "x.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = records(tmp_path / "**" / "*.py", format="text")
    assert [columns["text"] for _, columns in found] == ["1", "2", "3"]


def test_a_file_is_read_once_whatever_links_lead_to_it(tmp_path: Path, monkeypatch):
    for name in ("x.jsonl", "s/y.jsonl", "s/.hidden/z.jsonl", "elsewhere/w.jsonl"):
        (tmp_path / "e" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "e" / name).write_text(json.dumps({"text": name}))
    (tmp_path / "e/elsewhere").rename(tmp_path / "elsewhere")
    links = {"l": ".", "m": ".", "s/up": "../..", "again.jsonl": "x.jsonl", "out": "../elsewhere"}
    for link, to in (links | {"../elsewhere/back": "../e"}).items():
        (tmp_path / "e" / link).symlink_to(to)
    monkeypatch.chdir(tmp_path)
    texts = {
        "e/**/*.jsonl": ["x.jsonl", "elsewhere/w.jsonl", "s/y.jsonl"],
        "elsewhere/**/*.jsonl": ["x.jsonl", "elsewhere/w.jsonl", "s/y.jsonl"],
        "**/*.jsonl": ["x.jsonl", "s/y.jsonl", "elsewhere/w.jsonl"],
        "e/l/*.jsonl": ["x.jsonl"],
    }
    found = {path: sorted(columns["text"] for _, columns in records(path)) for path in texts}
    assert found == {path: sorted(wanted) for path, wanted in texts.items()}
    assert source.find_files(SourceConfig(path="e/**/*.jsonl")) == ["e/again.jsonl", "e/out/w.jsonl", "e/s/y.jsonl"]


PATTERNS = ["**/*.py", "a/**", "**", "*/**/c/*.py", "a/**/b/**/*.py", "a//**//*.py", "[[]q]/**/*", "a**/*.py"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_is_that_of_python(tmp_path: Path, monkeypatch, pattern: str):
    for name in ("0.py", "a/1.py", "a/b/2.py", "a/b/c/3.py", "a/.b/4.py", "a/b/.5.py", "[q]/6.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    wanted = {os.path.normpath(file) for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)}
    found = source.find_files(SourceConfig(path=pattern, format="text"))
    assert sorted(map(os.path.normpath, found)) == sorted(wanted)


def test_fields_rename_columns(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a", "id": 1}')
    found = records(path, fields={"prompt": "question", "completion": "answer"})
    assert found == [(1, {"prompt": "q", "completion": "a", "id": 1})]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert records(tmp_path / "a.txt") == records(tmp_path / "a.jsonl") == [(1, {"text": "hello"})]


def test_missing_files(tmp_path: Path):
    assert "no data file matches" in message(tmp_path / "nothing*.txt")
    assert "no data file matches" in message("data/nothing.jsonl")
    assert "holds no data file" in message(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(source.os, "access", lambda *_: False)  # the tests may run as root, who reads everything
    assert "a.txt' may not be read" in message(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    assert name in message(tmp_path / name)
    assert "empty" in message(tmp_path / name)


def test_an_empty_array_and_empty_files_of_a_glob(tmp_path: Path):
    (tmp_path / "a.json").write_text("[]")
    assert "empty" in message(tmp_path / "a.json")
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("")
    assert "all 2 files" in message(tmp_path / "*.txt")


def test_a_broken_line_is_named_with_its_number(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')
    assert f"{path}, line 3 is not JSON" in message(path)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_broken_array(tmp_path: Path, monkeypatch, chunk: int):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    path = tmp_path / "a.json"
    broken = {
        '[{"text": "a"},\n {"text": }]': "line 2 is not a JSON array: Expecting value at column 11",
        '[{"text": "a"}\n {"text": "b"}]': "line 2 is not a JSON array: Expecting ',' or ']' at column 2",
        '[{"text": "a"},\n': "line 2 is not a JSON array: Expecting value",
        '[{"text": "a"}]\n[]': "line 2 is not a JSON array: the array has ended",
        '[{"text": "a"},\n {"text": "b': "Unterminated string",
        '{\n "text": "a"\n}': "is not JSON: Expecting property name enclosed in double quotes",
        '"a"': "line 1 is not a JSON array: an array of objects, or one object a line, is needed at column 1",
    }
    for content, wanted in broken.items():
        path.write_text(content)
        assert wanted in message(path)


UNREADABLE = {
    '{"text": "a", "text": "b"}': "the key 'text' is given twice in one object",
    '{"text": "a", "meta": [{"id": 1, "n": 2, "id": 1}]}': "the key 'id' is given twice in one object",
    '{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"text": "a", "n": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}": "nested too deeply",
    '{"text": "a", "n": ' + "9" * 5_000 + "}": "a whole number has thousands of digits",
}


@pytest.mark.parametrize("value", UNREADABLE, ids=UNREADABLE.values())
@pytest.mark.parametrize("chunk", [1000, 1 << 20])
def test_json_that_python_reads_in_part_or_not_at_all(tmp_path: Path, monkeypatch, value: str, chunk: int):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{value}\n')
    assert message(path).startswith(f"{path}, line 2: ")
    assert UNREADABLE[value] in message(path)
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}},\n{value}]')
    assert message(path).startswith(f"{path}, the value that begins in line 2: ")
    assert UNREADABLE[value] in message(path)


def test_numbers_beyond_all_bounds_in_a_column_that_is_not_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\u0000b", "n": [1e999, -1e999, NaN, ' + "9" * 4000 + "]}\n")
    assert records(path)[0][1]["text"] == "a\0b"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RecursionError("deep"), OverflowError("large")])
def test_whatever_cannot_be_read_is_named_with_its_place(tmp_path: Path, monkeypatch, error: Exception):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')

    def failing(stream, file):
        yield 1, {"text": "a"}, 5
        raise error

    monkeypatch.setattr(source, "read_json_lines", failing)
    assert message(path).startswith(f"{path}, line 1: what follows cannot be read (")


def test_json_may_hold_objects_by_the_line(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(' {"text": "a"}\n\n{"text": "b"}\n')
    assert records(path) == [(1, {"text": "a"}), (2, {"text": "b"})]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_an_array_is_read_wherever_the_chunks_end(tmp_path: Path, monkeypatch, chunk: int):
    values = [{"text": 'é"\\', "n": 12.5, "deep": [[], {"a": True, "b": None}]}, {"text": "\U0001f600" * 20}] * 3
    path = tmp_path / "a.json"
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False)):
        path.write_text(text)
        assert [columns for _, columns in records(path)] == values


def test_a_record_that_is_no_object(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n["b"]\n')
    assert "a.jsonl, line 2 is a JSON array" in message(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[{"text": "a"}, "b"]')
    assert "a.json, record 2 is a JSON string" in message(tmp_path / "a.json")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.txt", "é fine\n".encode() + b"\xf0 broken", {}),
        ("a.txt", b"one|two|" + b"thr\xf0e", {"separator": "|"}),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xf0"}\n', {}),
        ("a.json", b'[{"text": "\xf0"}]', {}),
        ("a.csv", b"text\nfine\n\xf0\n", {}),
    ],
)
def test_bytes_that_are_not_utf8_are_named_with_their_offset(
    tmp_path: Path, name: str, content: bytes, options: dict, mark: bytes
):
    path = tmp_path / name
    path.write_bytes(mark + content)
    wrong = (mark + content).index(0xF0)
    assert f"{path} is not UTF-8: byte 0xf0 at offset {wrong}." in message(path, **options)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(mark + content))
    assert f"{path} is not UTF-8: byte 0xf0 at offset {wrong} of the decompressed" in message(path, **options)


def test_a_field_that_the_file_lacks(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}')
    text = message(path, fields={"prompt": "qestion"})
    assert "line 1" in text
    assert "Did you mean 'question'?" in text
    assert "Found: question, answer" in text


def test_fields_lead_into_objects_and_lists(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"data": {"chat": [1]}, "answers": {"text": ["yes", "no"]}, "a.b": "c"}')
    fields = {"messages": "data.chat", "completion": "answers.text.1", "prompt": "a.b"}
    found = dict(records(path, fields=fields))[1]
    assert {name: found[name] for name in fields} == {"messages": [1], "completion": "no", "prompt": "c"}
    assert "no column 'answers.text.2'" in message(path, fields={"completion": "answers.text.2"})


def test_a_null_is_no_column(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "b": null, "c": null}')
    assert records(path, fields={"d": "c"}) == [(1, {"text": "a"})]


def test_an_unknown_suffix_and_a_separator_without_text(tmp_path: Path):
    (tmp_path / "a.py").write_text("a,b")
    assert "`format: text`" in message(tmp_path / "a.py")
    assert records(tmp_path / "a.py", format="text") == [(1, {"text": "a,b"})]
    (tmp_path / "a.jsonl").write_text("{}")
    assert "`separator` is for text" in message(tmp_path / "a.jsonl", separator="x")


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ValidationError, match="Did you mean 'messages'"):
        SourceConfig(path="a", format="mesages")


def test_real_files(shared: Path):
    alpaca = shared / "data/alpaca/alpaca_5k.json"
    assert [columns for _, columns in records(alpaca)] == json.loads(alpaca.read_text())
    stories = records(shared / "data/tinystories/train.txt", separator="\n<|endoftext|>\n")
    assert len(stories) == 2316
    assert sum(record.size for record in read(SourceConfig(path=str(alpaca)))) == pytest.approx(1_973_103, rel=0.01)
