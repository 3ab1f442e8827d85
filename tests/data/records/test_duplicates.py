"""Nothing that is trained on is held out: not another turn of its conversation, nor a copy of it in another file."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.records.duplicates import content_of, held_out_groups, joined, numbered, refuse_overlaps
from jaxllm.data.records.source import SourceConfig, find_files
from jaxllm.data.rows.loader import DataConfig, plans
from jaxllm.data.rows.pack import PackPlan, split
from jaxllm.data.rows.store import Store, open_or_build

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def chats(numbers) -> list[dict]:
    return [{"messages": [{**turn, "content": f"{turn['content']} {i}"} for turn in TURNS], "id": i} for i in numbers]


def said(plan: PackPlan, store: Store) -> set[str]:
    """The number in each record of a plan, which its file and line do not tell."""
    lines = {}
    found = set()
    for file, index in (store.origin(int(i)) for i in plan.piece_sample):
        lines.setdefault(file, Path(file).read_text().splitlines())
        found.add(json.dumps(lines[file][index - 1]).split("one ")[1].split('"')[0].rstrip("\\"))
    return found


@pytest.mark.parametrize("weights", [(None, None), (1.0, 3.0)])
def test_copies_and_turns_are_on_one_side(write_lines, byte_tokenizer, tmp_path: Path, weights):
    """Ten conversations are in both files, in one of them turn by turn; five are in each alone."""
    sources = [
        SourceConfig(path=write_lines(chats(range(15)), "a.jsonl"), split_turns=True, weight=weights[0]),
        SourceConfig(path=write_lines(chats(range(19, 4, -1)), "b.jsonl"), weight=weights[1]),
    ]
    config = DataConfig(sources=sources, seq_len=256, eval_fraction=0.2)
    store = open_or_build(sources, byte_tokenizer, cache=tmp_path, progress=False)
    assert store.repeated == (10, 30)
    train, held_out = plans(config, store, seed=0, batch_size=2)
    assert held_out is not None
    trained, out = said(train, store), said(held_out, store)
    assert not trained & out
    assert trained | out == {str(i) for i in range(20)}
    assert len(out) == 4  # a fifth; with weights of the first source's fifteen, and of the five that the second adds
    again = plans(config, store, seed=0, batch_size=2)[1]
    assert again is not None
    np.testing.assert_array_equal(again.piece_sample, held_out.piece_sample)
    # As an earlier version drew: samples, of which some are of conversations that are trained on, too.
    train, held_out = plans(config, store, seed=0, batch_size=2, held_out_by="samples")
    assert held_out is not None
    assert said(train, store) & said(held_out, store)


def test_without_copies_the_draw_is_that_of_samples(write_lines, byte_tokenizer, tmp_path: Path):
    source = SourceConfig(path=write_lines([{"text": f"text {i}"} for i in range(40)]))
    config = DataConfig(sources=[source], seq_len=16, eval_fraction=0.1)
    store = open_or_build([source], byte_tokenizer, cache=tmp_path, progress=False)
    assert store.repeated == (0, 40)
    drawn = [plans(config, store, 0, 2, held_out_by=by)[1] for by in ("records", "samples")]
    assert drawn[0] is not None
    assert drawn[1] is not None
    np.testing.assert_array_equal(drawn[0].piece_sample, drawn[1].piece_sample)


def test_two_readings_of_one_file_are_on_one_side(write_lines, byte_tokenizer, tmp_path: Path):
    path = write_lines([{"q": f"question {i}", "one": f"a {i}", "other": f"b {i}"} for i in range(30)])
    sources = [SourceConfig(path=path, fields={"prompt": "q", "completion": name}) for name in ("one", "other")]
    store = open_or_build(sources, byte_tokenizer, cache=tmp_path, progress=False)
    config = DataConfig(sources=sources, seq_len=64, eval_fraction=0.3)
    sides = [{store.origin(int(i)) for i in plan.piece_sample} for plan in plans(config, store, 0, 2) if plan]
    assert [len(side) for side in sides] == [21, 9]
    assert not sides[0] & sides[1]
    refuse_overlaps(sources, [find_files(source) for source in sources])


def test_what_a_record_says():
    chat = {"messages": TURNS, "id": 7, "tools": None}
    alike = [
        (chat, ("messages", "tools")),
        (
            {"messages": [{"content": f" {t['content']}\n", "role": t["role"], "train": True} for t in TURNS]},
            ("messages",),
        ),
        ({"conversations": [{"from": "x", "value": turn["content"]} for turn in TURNS]}, ("conversations", "system")),
        ({"prompt": TURNS[:3], "completion": TURNS[3:]}, ("prompt", "completion")),
        ({"text": "one two\nthree four"}, ("text",)),
    ]
    assert len({content_of(columns, read) for columns, read in alike}) == 1
    others = [
        {"text": "one two three"},
        {"text": ""},
        {"text": "One two three four"},
        {"input_ids": [1, 2]},
        {"input_ids": [12]},
    ]
    assert len({content_of(columns, tuple(columns)) for columns in others}) == len(others)
    assert content_of({"text": "\ud800"}, ("text",)) != content_of({"text": "a"}, ("text",))


def test_numbers_of_groups():
    assert numbered(np.array([7, 3, 7, 9, 3])).tolist() == [0, 1, 0, 2, 1]
    assert joined(np.array([0, 1, 2, 3, 1]), np.array([0, 0, 1, 2, 2])).tolist() == [0, 0, 1, 0, 0]


def test_a_source_that_adds_nothing():
    """All of the second source is in the first, and all but one of the third."""
    parts = [np.arange(10), np.array([3, 3, 4]), np.array([5, 10])]
    held_out = held_out_groups(parts, 0.2, lambda n, fraction: split(n, fraction, 0))
    assert held_out.sum() == 2
    assert not held_out[10]


@pytest.mark.parametrize("name", ["data.jsonl", "link.jsonl", "*.jsonl"])
def test_overlapping_sources(write_lines, tmp_path: Path, name: str):
    write_lines([{"text": "a"}])
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    sources = [SourceConfig(path=str(tmp_path / path)) for path in ("d*.jsonl", name)]
    files = [find_files(source) for source in sources]
    with pytest.raises(UserError, match=r"data\.sources\.0 .* and data\.sources\.1 .* both have the file .*jsonl"):
        refuse_overlaps(sources, files)
    refuse_overlaps([source.model_copy(update={"weight": 1.0}) for source in sources], files)
