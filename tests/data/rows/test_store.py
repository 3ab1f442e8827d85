"""A store gives back every sample, is built once, and never half."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig, read
from jaxllm.data.rows import sealed, store
from jaxllm.data.rows.store import Store, open_or_build
from jaxllm.data.text import formats
from jaxllm.data.text.segments import Segment, Text
from jaxllm.data.text.tokenize import Encoder


def build(sources: SourceConfig | list[SourceConfig], tokenizer, cache: Path) -> Store:
    sources = sources if isinstance(sources, list) else [sources]
    return open_or_build(sources, tokenizer, cache=cache, progress=False)


def left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "tokens").iterdir()]


@pytest.fixture
def counted_builds(monkeypatch) -> list[int]:
    """The list gets an entry for every batch that is tokenized."""
    encode, calls = Encoder.encode, []

    def counting(self, rendered):
        calls.append(len(rendered))
        return encode(self, rendered)

    monkeypatch.setattr(Encoder, "encode", counting)
    return calls


@pytest.mark.parametrize("batch", [1, 2, 4096])
def test_samples_come_back_with_their_origin(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch, batch: int):
    monkeypatch.setattr(store, "BATCH_RECORDS", batch)
    texts = write_lines([{"text": "añb"}, {"text": ""}, {"text": "long " * 50}], "a.jsonl")
    pairs = write_lines([{"prompt": "ab", "completion": "c"}, {"prompt": "x", "completion": ""}], "b.jsonl")
    built = build([SourceConfig(path=texts), SourceConfig(path=pairs)], byte_tokenizer, tmp_path / "cache")
    assert len(built) == 3
    decoded = [byte_tokenizer.decode(built.sample(i).ids) for i in range(3)]
    assert decoded == ["<bos>añb<eos>", "<bos>" + "long " * 50 + "<eos>", "<bos>abc<eos>"]
    assert built.sample(2).trained.tolist() == [False, False, False, True, True]
    assert [built.origin(i) for i in range(3)] == [(texts, 1), (texts, 3), (pairs, 1)]
    assert built.lengths.tolist() == [6, 252, 5]
    assert built.first_trained.tolist() == [1, 1, 3]
    assert built.splittable.tolist() == [True, True, False]
    part = built.sample(0, 1, 3)
    assert byte_tokenizer.decode(part.ids[:1]) == "a"
    assert (part.ids.dtype, len(part.ids), part.trained.tolist()) == (np.int32, 2, [True, True])
    alone = Store(built.folder)
    assert (alone.key, alone.origin(2), alone.summary.formats["source 1"]) == (
        built.key,
        ("file 1", 1),
        "prompt_completion",
    )
    summary = built.summary
    assert (summary.samples, summary.tokens, summary.trained_tokens, summary.untrained) == (3, 263, 258, 2)
    assert summary.formats == {texts: "text", pairs: "prompt_completion"}
    assert "2 samples left out: nothing in them is trained" in str(summary)


def test_columns_that_are_not_read_are_said(write_lines, byte_tokenizer, tmp_path: Path):
    path = write_lines([{"text": "ab"}, {"text": "cd", "id": 1, "so\ud800": "x"}])
    summary = build(SourceConfig(path=path), byte_tokenizer, tmp_path / "cache").summary
    assert f"({path} as text without the columns id, so\\ud800)" in str(summary)
    many = write_lines([{"text": "ab"} | dict.fromkeys("abcdefghij", 1)], "many.jsonl")
    assert "a, b, c, d, e, f, g, h and 2 more" in str(
        build(SourceConfig(path=many), byte_tokenizer, tmp_path / "cache").summary
    )


def test_prompts_that_join_with_their_answers_are_said(write_lines, shared: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tokenizers/gpt2")
    pairs = [{"prompt": "Q: 2+2\nA:", "completion": " four"}, {"prompt": "Q: 3+3\nA: ", "completion": "six"}]
    path = write_lines(pairs)
    (note,) = build(SourceConfig(path=path), tokenizer, tmp_path / "cache").summary.notes
    assert note.startswith(f"{path}: in 1 of 2 samples the end of the prompt")
    assert f"({path}, line 2: 'Q: 3+3\\nA: ' and 'six')" in note
    assert "Move white space from the end of the prompt to the beginning of the answer" in note
    for columns in (("instruction", "output"), ("input", "output")):  # Alpaca's heading ends with a line end
        made = [dict(zip(columns, pair.values(), strict=True)) for pair in pairs]
        notes = build(SourceConfig(path=write_lines(made)), tokenizer, tmp_path / "cache").summary.notes
        assert len(notes) == (columns[0] == "input")


def test_it_is_built_once(write_lines, byte_tokenizer, tmp_path: Path, counted_builds):
    config = SourceConfig(path=write_lines([{"text": "ab"}]))
    first = build(config, byte_tokenizer, tmp_path)
    second = build(config, copy.deepcopy(byte_tokenizer), tmp_path)
    assert len(counted_builds) == 1
    assert first.folder == second.folder
    assert second.sample(0).ids.tolist() == first.sample(0).ids.tolist()


def test_it_is_built_anew_when_anything_changes(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch):
    path = write_lines([{"prompt": "a", "completion": "b"}])
    config = SourceConfig(path=path)
    folders = [build(config, byte_tokenizer, tmp_path).folder]
    other = copy.deepcopy(byte_tokenizer)
    other.chat_template = "{{ messages }}"
    folders.append(build(config, other, tmp_path).folder)
    # The wording of a template counts too.
    form = formats.FORMATS["prompt_completion"]
    louder = replace(
        form, render=lambda c, _: [Text((Segment(c["prompt"] + "!", False), Segment(c["completion"], True)))]
    )
    with monkeypatch.context() as patch:
        patch.setitem(formats.FORMATS._entries, "prompt_completion", louder)
        folders.append(build(config, byte_tokenizer, tmp_path).folder)
    mapped = config.model_copy(update={"fields": {"text": "prompt"}, "format": "text"})
    folders.append(build(mapped, byte_tokenizer, tmp_path).folder)
    write_lines([{"prompt": "a", "completion": "c"}])
    folders.append(build(config, byte_tokenizer, tmp_path).folder)
    folders.append(
        build([config, SourceConfig(path=write_lines([{"text": "b"}], "b.jsonl"))], byte_tokenizer, tmp_path).folder
    )
    assert len(set(folders)) == 6


def test_the_same_bytes_under_another_path_are_the_same_data(
    write_lines, byte_tokenizer, tmp_path: Path, counted_builds, monkeypatch
):
    (tmp_path / "here").mkdir()
    path = write_lines([{"text": "ab"}, {"text": "cd"}], "here/a.jsonl")
    first = build(SourceConfig(path=path), byte_tokenizer, tmp_path / "cache")
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    for moved in ("a.jsonl", "*.jsonl", ".", str(tmp_path / "there")):
        second = build(SourceConfig(path=moved), byte_tokenizer, tmp_path / "cache")
        assert second.folder == first.folder
        assert second.origin(1) == (str(Path("a.jsonl") if moved[-2:] != "re" else tmp_path / "there/a.jsonl"), 2)
        assert second.summary.formats == {moved: "text"}
    assert len(counted_builds) == 1


CLOCK = "{% for m in messages %}{{ strftime_now('%d %b %Y') }}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
CLOCK += "{% if add_generation_prompt %}{{ strftime_now('%d %b %Y') }}<|assistant|>{% endif %}"
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]


def test_the_date_of_a_chat_template_is_not_in_the_key(write_lines, byte_tokenizer, tmp_path: Path, counted_builds):
    dated = copy.deepcopy(byte_tokenizer)
    dated.chat_template = CLOCK
    config = SourceConfig(path=write_lines(CHAT))

    def opened(day: date | None) -> Store:
        return open_or_build([config], dated, day=day, cache=tmp_path / "cache", progress=False)

    stores = [opened(date(2026, 11, 29)), opened(date(2025, 1, 2)), opened(None), opened(date(2025, 1, 2))]
    texts = [dated.decode(store.sample(0).ids) for store in stores]
    assert ["29 Nov 2026<|user|>" in text for text in texts] == [True, False, True, False]
    assert "02 Jan 2025<|user|>hi<|end|>02 Jan 2025<|assistant|>yes" in texts[1]
    assert len({store.key for store in stores}) == 1
    assert len(counted_builds) == 2  # one for each day


DAMAGE = [(name, how) for how in ("lost", "cut") for name in ("tokens.npy", "ends.npy", "meta.json", "sums.bin")]
DAMAGE += [(name, "flipped") for name in ("ends.npy", "first_trained.npy", "record.npy", "meta.json", "sums.bin")]


@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_a_damaged_store_is_built_again(write_lines, byte_tokenizer, tmp_path: Path, counted_builds, name, how):
    config = SourceConfig(path=write_lines([{"text": f"record {i}"} for i in range(9)]))
    folder = build(config, byte_tokenizer, tmp_path / "cache").folder
    content = (folder / name).read_bytes()
    if how == "lost":
        (folder / name).unlink()
    elif how == "cut":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    notes: list[str] = []

    def opened() -> Store:
        return open_or_build([config], byte_tokenizer, cache=tmp_path / "cache", progress=False, note=notes.append)

    built = opened()
    assert [built.origin(i)[1] for i in range(9)] == [*range(1, 10)]
    assert byte_tokenizer.decode(built.sample(8).ids) == "<bos>record 8<eos>"
    assert len(notes) == 1
    assert name in notes[0]
    assert str(folder) in notes[0]
    assert len(counted_builds) == 2
    opened()
    assert (len(notes), len(counted_builds)) == (1, 2)
    assert left_over(tmp_path / "cache") == [folder.name]


@pytest.mark.parametrize("name", ["tokens.npy", "trained.npy"])
def test_damage_is_found_where_it_is_read(write_lines, byte_tokenizer, tmp_path: Path, counted_builds, name: str):
    """Tokens are verified by blocks when they are first read, as nobody can read terabytes at every start."""
    size = sealed.BLOCK  # more than a block of tokens before the last record
    config = SourceConfig(path=write_lines([{"text": "ab"}, {"text": "c" * size}, {"text": "de"}]))
    folder = build(config, byte_tokenizer, tmp_path / "cache").folder
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    opened = build(config, byte_tokenizer, tmp_path / "cache")
    assert byte_tokenizer.decode(opened.sample(0).ids) == "<bos>ab<eos>"
    with pytest.raises(UserError, match=rf"{folder} are damaged: {name} .*The next start tokenizes the data again"):
        opened.sample(2)
    assert len(counted_builds) == 1
    assert byte_tokenizer.decode(build(config, byte_tokenizer, tmp_path / "cache").sample(2).ids) == "<bos>de<eos>"
    assert len(counted_builds) == 2


def test_a_file_that_changes_while_it_is_tokenized(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch):
    path = write_lines([{"text": "ab"}])
    encode = Encoder.encode

    def writing(self, rendered):
        write_lines([{"text": "ab"}, {"text": "cd"}])
        return encode(self, rendered)

    monkeypatch.setattr(Encoder, "encode", writing)
    with pytest.raises(UserError, match="changed while it was tokenized"):
        build(SourceConfig(path=path), byte_tokenizer, tmp_path / "cache")
    assert left_over(tmp_path / "cache") == []


def test_the_cache_is_where_the_environment_says(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "here"))
    built = open_or_build([SourceConfig(path=write_lines([{"text": "ab"}]))], byte_tokenizer, progress=False)
    assert built.folder.is_relative_to(tmp_path / "here")
    monkeypatch.delenv("JAXLLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.cache_root() == tmp_path / "home/.cache/jaxllm"


def test_a_failed_build_leaves_nothing(write_lines, byte_tokenizer, tmp_path: Path):
    path = Path(write_lines([{"text": "ab"}] * 3))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="line 4 is not JSON"):
        build(SourceConfig(path=str(path)), byte_tokenizer, tmp_path / "cache")
    assert left_over(tmp_path / "cache") == []


def test_a_killed_build_leaves_no_store(write_lines, tmp_path: Path, byte_tokenizer):
    config = SourceConfig(path=write_lines([{"text": f"record {i}"} for i in range(10)]))
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = f"""
import os, signal
from pathlib import Path
from transformers import AutoTokenizer
from jaxllm.data.rows import store
from jaxllm.data.records.source import SourceConfig
from jaxllm.data.text.tokenize import Encoder
store.BATCH_RECORDS = 1
encode = Encoder.encode
def killing(self, rendered):
    if str(rendered[0]) == "record 7":
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, rendered)
Encoder.encode = killing
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
store.open_or_build([SourceConfig(path={config.path!r})], tokenizer, cache=Path({str(tmp_path / "cache")!r}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    (partial,) = left_over(tmp_path / "cache")
    assert partial.endswith(".partial")
    assert len(build(config, byte_tokenizer, tmp_path / "cache")) == 10


def test_what_a_killed_build_left_is_removed_after_a_day(write_lines, byte_tokenizer, tmp_path: Path):
    tokens = tmp_path / "tokens"
    for name, age in {"old.partial": 2 * store.STALE_SECONDS, "young.partial": 0.0}.items():
        (tokens / name / "new").mkdir(parents=True)
        file = tokens / name / "new/tokens.npy"
        file.touch()
        for path in (file, file.parent, file.parent.parent):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    built = build(SourceConfig(path=write_lines([{"text": "ab"}])), byte_tokenizer, tmp_path)
    assert sorted(left_over(tmp_path)) == sorted([built.folder.name, "young.partial"])


def test_of_two_builders_one_wins(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch):
    config = SourceConfig(path=write_lines([{"text": "ab"}, {"text": "cd"}]))
    rival = build(config, byte_tokenizer, tmp_path / "rival").folder
    write = store._write

    def overtaken(folder, *rest):
        write(folder, *rest)
        shutil.copytree(rival, tmp_path / "cache/tokens" / rival.name)

    monkeypatch.setattr(store, "_write", overtaken)
    built = build(config, byte_tokenizer, tmp_path / "cache")
    assert len(built) == 2
    assert left_over(tmp_path / "cache") == [rival.name]


def test_nothing_trained(write_lines, byte_tokenizer, tmp_path: Path):
    path = write_lines([{"prompt": "ab", "completion": ""}] * 2)
    with pytest.raises(UserError, match=r"nothing is trained in .*data.jsonl.* none of 2 samples"):
        build(SourceConfig(path=path), byte_tokenizer, tmp_path / "cache")
    chat = write_lines([{"messages": [{"role": "user", "content": "hi"}]}], "chat.jsonl")
    with pytest.raises(UserError, match=r"nothing is trained in .*chat.jsonl"):
        build(SourceConfig(path=chat), byte_tokenizer, tmp_path / "cache")


def test_a_bad_record_is_named(write_lines, byte_tokenizer, tmp_path: Path):
    path = write_lines([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": "b"}])
    with pytest.raises(UserError, match=r"data.jsonl, line 2: .*needs the column 'completion'. Did you mean"):
        build(SourceConfig(path=path), byte_tokenizer, tmp_path / "cache")
    odd = write_lines([{"a": "b"}], "odd.jsonl")
    with pytest.raises(UserError, match=r"odd.jsonl, line 1: the columns a fit no format"):
        build(SourceConfig(path=odd), byte_tokenizer, tmp_path / "cache")


def test_a_record_that_python_cannot_render_is_named(write_lines, byte_tokenizer, tmp_path: Path):
    deep: list = []
    for _ in range(900):  # which JSON's reader accepts
        deep = [deep]
    user = {"role": "user", "content": "hi", "extra": deep}
    path = write_lines(
        [{"messages": [user, {"role": "assistant", "content": "yo"}], "tools": [{"name": "f", "x": deep}]}]
    )
    template = tmp_path / "t.jinja"
    template.write_text("{{ tools | tojson }}" + byte_tokenizer.chat_template)
    with pytest.raises(UserError, match=r"data.jsonl, line 1: "):
        build(SourceConfig(path=path, chat_template=str(template)), byte_tokenizer, tmp_path / "cache")


def test_a_full_disk(write_lines, byte_tokenizer, tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device.*JAXLLM_CACHE"):
        build(SourceConfig(path=write_lines([{"text": "ab"}])), byte_tokenizer, tmp_path / "cache")
    assert left_over(tmp_path / "cache") == []


def test_a_large_vocabulary_keeps_its_ids(write_lines, shared: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    path = write_lines([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "日本"}]}])
    ids = build(SourceConfig(path=path), tokenizer, tmp_path / "cache").sample(0).ids
    assert ids.max() > np.iinfo(np.uint16).max
    assert "日本<|im_end|>" in tokenizer.decode(ids)


def test_a_real_data_set(shared: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories3M")
    config = SourceConfig(path=str(shared / "data/tinystories/valid.jsonl"))
    built = build(config, tokenizer, tmp_path)
    assert len(built) == 324
    for i, record in enumerate(read(config)):
        assert built.sample(i).ids.tolist() == [*tokenizer(record.columns["text"]).input_ids, tokenizer.eos_token_id]
        assert built.origin(i) == (config.path, record.index)
    assert np.load(built.folder / "tokens.npy", mmap_mode="r").dtype == np.uint16
    assert json.loads((built.folder / "meta.json").read_text())["facts"]["summary"]["tokens"] == built.lengths.sum()
