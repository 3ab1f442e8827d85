"""Which files of a folder or of a Hub data set are read: as their names and the README say, never by a guess."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig, find_files, read
from jaxllm.data.records.splits import Choice, choose
from tests.support.hub_cache import add_repository, ask, server

ULTRACHAT = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: [data/test_sft-*]
---
# UltraChat
"""
GSM8K = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_dir: socratic
  data_files: "*.csv"
---
"""


def shards(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{i:05}-of-{count:05}.parquet" for i in range(count)]


TRAIN, SFT = shards("data/train", 2), shards("data/train_sft", 3)

CHOICES = {
    "files without a split": (["b.jsonl", "a.jsonl", "notes.md", ".cache/c.jsonl"], "", {}, ["a.jsonl", "b.jsonl"]),
    "train before test": (["train.jsonl", "test.jsonl", "LICENSE.txt", "dataset_infos.json"], "", {}, ["train.jsonl"]),
    "another split": (["train.jsonl", "val.jsonl"], "", {"split": "validation"}, ["val.jsonl"]),
    "split in the middle": (["x_train_500.csv.gz", "x-dev.csv.gz"], "", {}, ["x_train_500.csv.gz"]),
    "folders of splits": (["train/0.txt", "train/1.txt", "test/0.txt"], "", {}, ["train/0.txt", "train/1.txt"]),
    "no split by a word in a word": (["latest.jsonl", "contests.jsonl"], "", {}, ["contests.jsonl", "latest.jsonl"]),
    "shards": ([*TRAIN, *shards("data/test", 1)], "", {}, TRAIN),
    "shards of any split": ([*SFT, *TRAIN], "", {"split": "train_sft"}, SFT),
    "save_to_disk": (
        ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "dataset_info.json", "state.json"],
        "",
        {},
        ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"],
    ),
    "save_to_disk of a dict": (
        ["train/data-00000-of-00001.arrow", "train/state.json", "test/data-00000-of-00001.arrow", "dataset_dict.json"],
        "",
        {},
        ["train/data-00000-of-00001.arrow"],
    ),
    "subset by folder": (["en/train.csv", "de/train.csv"], "", {"subset": "de"}, ["de/train.csv"]),
    "readme": ([*SFT, *shards("data/test_sft", 1)], ULTRACHAT, {"split": "train_sft"}, SFT),
    "readme with subsets": (shards("main/train", 1), GSM8K, {"subset": "main"}, shards("main/train", 1)),
    "readme with a folder": (
        ["socratic/a.csv", "a.csv"],
        GSM8K,
        {"subset": "socratic"},
        ["socratic/a.csv"],
    ),
    "readme without configs": (["train.csv"], "---\nlicense: mit\n---\n", {}, ["train.csv"]),
    "readme that is broken": (["train.csv"], "---\n: [\n---\n", {}, ["train.csv"]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case: str):
    names, readme, asked, wanted = CHOICES[case]
    assert choose(names, readme, Choice("it", **asked)) == wanted


UNCLEAR = {
    "nothing": (["a.md"], "", {}, "it holds no data file"),
    "kinds": (["a.jsonl", "b.txt"], "", {}, "several kinds (jsonl: a.jsonl, text: b.txt); name those meant by a glob"),
    "no such split": (["train.csv", "test.csv"], "", {"split": "tets"}, "no split 'tets'. Did you mean 'test'?"),
    "splits and others": (["a.csv", "test.csv"], "", {}, "files of the splits test, and others such as a.csv"),
    "no train": (["a-test.csv", "a-val.csv"], "", {}, "the splits test, validation; choose one, such as `split: test`"),
    "folders": (
        ["de/a.csv", "en/a.csv"],
        "",
        {},
        "in 2 folders (de, en); choose one by `subset: en`, or name",
    ),
    "subset": (["de/a.csv"], "", {"subset": "fr"}, "no subset 'fr'"),
    "a shard is missing": (TRAIN[:1], "", {}, "has 1 of the 2 files data/train-*-of-00002"),
    "subsets of the readme": (shards("main/train", 1), GSM8K, {}, "the subsets main, socratic; choose one"),
    "splits of the readme": (SFT, ULTRACHAT, {}, "the splits train_sft, test_sft; choose one"),
    "not there": ([], ULTRACHAT, {"split": "test_sft"}, "which its README.md places in data/test_sft-*"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_unclear(case: str):
    names, readme, asked, wanted = UNCLEAR[case]
    with pytest.raises(UserError) as caught:
        choose(names, readme, Choice("it", **asked))
    assert wanted in str(caught.value)


LINES = {"train": b'{"text": "train"}\n', "test": b'{"text": "test"}\n'}


def texts(path: str | Path, **options) -> list[str]:
    return [record.columns["text"] for record in read(SourceConfig(path=str(path), **options))]


def refused(path: str | Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        find_files(SourceConfig(path=str(path), **options))
    return str(caught.value)


@pytest.mark.parametrize("front", ["a: [", "date: 2024-13-45", "a: " + "[" * 5000 + "]" * 5000, "a: !!python/none x"])
def test_a_card_that_is_no_yaml_describes_nothing(front: str):
    assert choose(["train.jsonl"], f"---\n{front}\n---\n", Choice("a")) == ["train.jsonl"]


def test_a_folder(tmp_path: Path):
    for split, content in LINES.items():
        (tmp_path / f"{split}.jsonl").write_bytes(content)
    assert texts(tmp_path) == ["train"]
    assert texts(tmp_path, split="test") == ["test"]
    assert "one file or a glob, which has no split" in refused(tmp_path / "*.jsonl", split="test")


def test_a_folder_as_datasets_saves_it(tmp_path: Path):
    """`Dataset.save_to_disk` writes Arrow streams beside its own JSON."""
    table = pa.table({"text": ["a", "b", "c"]})
    for i in range(2):
        with pa.ipc.new_stream(str(tmp_path / f"data-0000{i}-of-00002.arrow"), table.schema) as writer:
            writer.write_table(table.slice(2 * i, 2))
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    assert texts(tmp_path) == ["a", "b", "c"]


def save(folder: Path, rows: list[str], split: str | None = None) -> None:
    """What `Dataset.save_to_disk` writes, and a cache that `map` left beside it."""
    folder.mkdir(parents=True)
    for name, values in {"data-00000-of-00001": rows, "cache-2d0a802b78a30b76": [row.upper() for row in rows]}.items():
        table = pa.table({"text": values})
        with pa.ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_without_its_caches(tmp_path: Path):
    save(tmp_path / "one", ["a", "b"], "train")
    assert texts(tmp_path / "one") == texts(tmp_path / "one", split="train") == ["a", "b"]
    assert texts(tmp_path, subset="one") == ["a", "b"]
    assert "has the split train alone" in refused(tmp_path / "one", split="test")
    (tmp_path / "one/data-00000-of-00001.arrow").unlink()
    assert "data-00000-of-00001.arrow is missing" in refused(tmp_path / "one")
    (tmp_path / "one/state.json").write_text('{"_data_files": [{"filename": "../two.arrow"}]}')
    assert "names no data files, or none of this folder" in refused(tmp_path / "one")
    (tmp_path / "one/state.json").write_text("{")
    assert "state.json is not JSON" in refused(tmp_path / "one")


def test_a_saved_data_set_of_several_splits(tmp_path: Path):
    for split in ("alpha", "beta"):
        save(tmp_path / split, [split], split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["alpha", "beta"]}')
    assert "has the splits alpha, beta; choose one" in refused(tmp_path)
    assert texts(tmp_path, split="beta") == ["beta"]
    assert "Did you mean 'beta'?" in refused(tmp_path, split="betta")


def test_a_data_set_of_the_hub_that_is_cached(hub: Path):
    add_repository(hub, "dataset", "o/n", {f"{split}.jsonl": content for split, content in LINES.items()})
    assert texts("o/n") == texts("hf://datasets/o/n") == texts("o/n@main") == ["train"]
    assert texts("o/n", split="test") == texts("hf://datasets/o/n/test.jsonl") == ["test"]
    assert texts("hf://datasets/o/n/*.jsonl") == ["test", "train"]
    first = next(read(SourceConfig(path="o/n")))
    assert first.origin == "hf://datasets/o/n@0123456/train.jsonl, line 1"
    assert "the Hub dataset o/n has no split 'tran'. Did you mean 'train'?" in refused("o/n", split="tran")
    assert "has no file 'tset.jsonl'. Did you mean 'test.jsonl'?" in refused("hf://datasets/o/n/tset.jsonl")


def test_part_of_a_data_set_is_cached(hub: Path):
    add_repository(hub, "dataset", "o/n", {TRAIN[0]: b"PAR1"})
    said = refused("o/n")
    assert "is not whole in the cache (the Hub dataset o/n has 1 of the 2 files data/train-*-of-00002" in said
    assert "`hf download o/n --repo-type dataset`" in said


def test_a_file_of_that_name_comes_first(hub: Path, tmp_path: Path, monkeypatch):
    add_repository(hub, "dataset", "o/n", {"train.jsonl": LINES["train"]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n").mkdir(parents=True)
    (tmp_path / "o" / "n" / "a.jsonl").write_text('{"text": "local"}')
    assert texts("o/n") == ["local"]


def test_download_of_what_is_needed(hub: Path, monkeypatch):
    files = {"README.md": GSM8K.encode(), "main/train-a.parquet": b"", "main/test-a.parquet": b"", "script.py": b"code"}
    with server("dataset", "o/n", {**files, "main/train-a.parquet": b"the file"}) as (address, fetched):
        ask(monkeypatch, address)
        config = SourceConfig(path="o/n", subset="main")
        (file,) = find_files(config)
        assert Path(file).read_bytes() == b"the file"
        assert fetched == ["README.md", "main/train-a.parquet"]
    assert find_files(config) == [file]  # from the cache
