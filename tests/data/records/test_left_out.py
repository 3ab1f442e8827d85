"""Files of a folder that are not read for their suffix are named with the remedy that fits."""

from pathlib import Path

from jaxllm.data.records.left_out import left_out
from jaxllm.data.records.source import SourceConfig, read


def test_a_folder_of_data_alone(tmp_path: Path):
    for name in ("a.jsonl", "b.txt.gz", "README.md", "dataset_info.json", ".git/config", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert left_out(str(tmp_path)) == ""
    assert left_out(str(tmp_path / "a.jsonl")) == ""
    assert left_out("owner/name") == ""


def test_other_endings_are_counted_and_the_remedy_works(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.md", "deep/c.md", "d.rst", "e"):
        (tmp_path / name).write_text(f"{name}: é")
    (tmp_path / "f.zip").write_bytes(b"PK\3\4\0")
    said = left_out(f"{tmp_path}/")
    for part in ("5 files in", "2 .md such as b.md", "1 .rst such as d.rst", "1 (none) such as e", "unpack archives"):
        assert part in said
    assert f"{tmp_path}/**/*.md, and set `format: text`" in said
    found = read(SourceConfig(path=f"{tmp_path}/**/*.md", format="text"))
    assert [record.columns["text"] for record in found] == ["b.md: é", "deep/c.md: é"]


def test_what_is_no_text_has_its_own_remedy(tmp_path: Path):
    (tmp_path / "a.xlsx").write_bytes(b"\0\xff")
    assert "`format: text`" not in left_out(str(tmp_path))
    (tmp_path / "a.xlsx").rename(tmp_path / "a.md")
    (tmp_path / "a.md").write_text("a" + "é" * 4096)  # of which the bytes that are looked at may cut one
    assert "unpack" not in left_out(str(tmp_path))
