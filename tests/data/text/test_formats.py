"""Each format makes of its columns trained and untrained text, and says what does not fit."""

import copy
import itertools

import numpy as np
import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig
from jaxllm.data.text.chat import RenderConfig
from jaxllm.data.text.formats import FOREIGN_FORMATS, FORMATS, Renderer, detect
from jaxllm.data.text.segments import Rendered, Segment, Text, Tokens

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
# One record of each format, with every column that it may have.
RECORDS = {
    "text": {"text": "abc"},
    "prompt_completion": {"prompt": "a ", "completion": "b"},
    "instruction": {"instruction": "Add.", "input": "1 2", "output": "3", "system": "", "history": []},
    "input_output": {"input": "a", "output": "b"},
    "messages": {"messages": TURNS, "tools": None},
    "conversations": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "tokens": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
    "segments": {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]},
}


def render(name: str, columns: dict, tokenizer, *, detected: bool = False, **options) -> list[Rendered]:
    return Renderer(name, RenderConfig(**options), tokenizer, detected=detected)(columns)


def parts(rendered: list[Rendered]) -> list[tuple[str, bool]]:
    (text,) = rendered
    assert isinstance(text, Text)
    return [(segment.text, segment.trained) for segment in text.segments]


def message(name: str, columns: dict, tokenizer, **options) -> str:
    with pytest.raises(UserError) as caught:
        render(name, columns, tokenizer, **options)
    return str(caught.value)


def test_every_format_has_a_record_here():
    assert set(RECORDS) == set(FORMATS)


@pytest.mark.parametrize("name", RECORDS)
def test_the_format_is_told_from_the_columns(name: str):
    assert detect(RECORDS[name] | {"id": 7}) == name
    needed = {column: RECORDS[name][column] for column in FORMATS[name].columns}
    assert detect(needed) == name


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(RECORDS, 2)))
def test_columns_of_two_formats_are_ambiguous(one: str, other: str):
    both = RECORDS[one] | RECORDS[other]
    if {one, other} == {"instruction", "input_output"}:  # an instruction's record has the other's columns anyway
        assert detect(both) == "instruction"
        return
    with pytest.raises(UserError, match=r"more than one format \(.*\); choose one by `format:`") as caught:
        detect(both)
    assert one in str(caught.value)
    assert other in str(caught.value)


def test_other_names_of_formats_are_explained():
    assert set(FOREIGN_FORMATS.values()) <= set(FORMATS)
    assert not set(FOREIGN_FORMATS) & set(FORMATS)
    with pytest.raises(ValueError, match=r"'sharegpt'\. It is called 'conversations' here"):
        SourceConfig(path="x", format="sharegpt")


def test_columns_that_fit_no_format():
    with pytest.raises(UserError, match=r"Did you mean 'completion'\?.*fields.*prompt_completion: prompt, completion"):
        detect({"question": "", "completions": ""})


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "`fields: {completion: chosen}`"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "`fields: {completion: chosen}`"),
        ({"chosen": TURNS, "rejected": TURNS}, "`fields: {messages: chosen}`"),
        ({"messages": TURNS, "label": False}, "Keep the good ones"),
        *(
            ({"prompt": "a", "completion": "b", column: value}, f"the column {column} ({value!r}) says whether")
            for column, value in [
                *(("label", word) for word in ("True", "false ", "0", 1, 0.0, "Chosen", "bad", "-1", "thumbs_up")),
                ("kto_tag", True),
            ]
        ),
    ],
)
def test_preferences_are_refused(columns: dict, remedy: str):
    with pytest.raises(UserError, match="preferences") as caught:
        detect(columns)
    assert remedy in str(caught.value)


def test_a_class_beside_a_text_is_no_preference():
    assert detect({"text": "a", "label": True}) == "text"
    assert detect({"prompt": "a", "completion": "b", "label": 3}) == "prompt_completion"


def test_a_rating_is_refused_in_whichever_record_it_is(byte_tokenizer):
    pair = {"prompt": "a", "completion": "b"}
    renderer = Renderer("prompt_completion", RenderConfig(), byte_tokenizer, detected=True)
    renderer(pair)
    with pytest.raises(UserError, match=r"'no'\) says whether the answer is good or bad.*`format: prompt_completion`"):
        renderer(pair | {"label": "no"})
    assert render("prompt_completion", pair | {"label": "no"}, byte_tokenizer)  # the user chose the format
    scale = Renderer("prompt_completion", RenderConfig(), byte_tokenizer, detected=True)
    for label in ("", "news", 3, 1, "0"):  # a number beyond the two ratings: the others are none either
        scale(pair | {"label": label})


# A record of each format in which every column matters; as the chat template, one that writes all it is given.
TELLING = {
    "text": [{"text": "abc"}],
    "prompt_completion": [
        {"prompt": "a ", "completion": "b"},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "system": "Be exact.", "tools": [{"name": "sum"}]},
    ],
    "instruction": [
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be exact.", "history": [["a", "b"]]}
    ],
    "input_output": [{"input": "a", "output": "b"}],
    "messages": [{"messages": TURNS, "system": "Be exact.", "tools": '[{"name": "sum"}]'}],
    "conversations": [RECORDS["conversations"] | {"system": "Be exact.", "tools": [{"name": "sum"}]}],
    "tokens": [{"input_ids": [1, 2, 3], "labels": [1, 2, -100], "attention_mask": [0, 1, 1]}],
    "segments": [RECORDS["segments"]],
}


@pytest.mark.parametrize(
    ("name", "record", "column"),
    [(name, record, column) for name in FORMATS for record in TELLING[name] for column in record],
)
def test_no_column_that_a_format_declares_is_ignored(byte_tokenizer, tmp_path, name: str, record: dict, column: str):
    options = {}
    if FORMATS[name].chat and not isinstance(record.get("prompt"), str):
        (tmp_path / "tools.jinja").write_text("{{ tools | tojson if tools }}" + byte_tokenizer.chat_template)
        options = {"chat_template": str(tmp_path / "tools.jinja")}

    def facts(columns: dict) -> object:
        rendered = render(name, columns, byte_tokenizer, **options)
        return [[part.ids.tolist(), part.trained.tolist()] if isinstance(part, Tokens) else part for part in rendered]

    rest = {key: value for key, value in record.items() if key != column}
    if column in FORMATS[name].columns:
        assert f"needs the column {column!r}" in message(name, rest, byte_tokenizer, **options)
    else:
        assert facts(rest) != facts(record)


def test_every_declared_column_is_in_that_table():
    for name in FORMATS:
        declared = {*FORMATS[name].columns, *FORMATS[name].optional}
        assert set().union(*TELLING[name]) == declared


@pytest.mark.parametrize("column", ["system", "tools"])
def test_strings_have_no_place_for_a_system_text_or_tools(byte_tokenizer, column: str):
    pair = {"prompt": "a", "completion": "b"}
    given = {"system": "Be exact.", "tools": [{"name": "sum"}]}[column]
    text = message("prompt_completion", pair | {column: given}, byte_tokenizer)
    assert f"the column {column!r} is for conversations" in text
    assert f"`fields: {{unread: {column}}}`" in text
    assert parts(render("prompt_completion", pair | {column: "", "unread": given}, byte_tokenizer)) == [
        ("a", False),
        ("b", True),
    ]


def test_columns_that_a_format_does_not_read_are_collected(byte_tokenizer):
    renderer = Renderer("input_output", RenderConfig(), byte_tokenizer, detected=True)
    renderer({"input": "a", "output": "b", "system": "Be exact."})
    renderer({"id": 1, "input": "a", "output": "b"})
    assert list(renderer.unread) == ["system", "id"]


def test_every_format_names_a_missing_column(byte_tokenizer):
    for name in FORMATS:
        first = FORMATS[name].columns[0]
        text = message(name, {first + "s": "x"}, byte_tokenizer)
        assert f"needs the column {first!r}. Did you mean '{first}s'?" in text


@pytest.mark.parametrize(("name", "other"), [("text", "messages"), ("input_output", "instruction")])
def test_a_record_of_another_kind_is_named(byte_tokenizer, name: str, other: str):
    renderer = Renderer(name, RenderConfig(), byte_tokenizer, detected=True)
    renderer(RECORDS[name])
    with pytest.raises(UserError, match=rf"this record is of format '{other}' .* first one .* of format '{name}'"):
        renderer(RECORDS[other])


def test_a_chosen_format_is_not_questioned(byte_tokenizer):
    both = {"instruction": "x", "input": "a", "output": "b"}
    assert parts(render("input_output", both, byte_tokenizer)) == [("a", False), ("b", True)]


def test_text_is_all_trained(byte_tokenizer):
    assert render("text", {"text": "abc"}, byte_tokenizer) == [Text((Segment("abc", True),), splittable=True)]


@pytest.mark.parametrize(("name", "first", "second"), [("prompt_completion", *RECORDS["prompt_completion"].values())])
def test_a_prompt_is_not_trained(byte_tokenizer, name: str, first: str, second: str):
    for columns, form in ((RECORDS[name], name), ({"input": first, "output": second}, "input_output")):
        assert parts(render(form, columns, byte_tokenizer)) == [(first, False), (second, True)]
        assert parts(render(form, columns, byte_tokenizer, train_on="all")) == [(first, True), (second, True)]


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_an_instruction_without_input(byte_tokenizer, given: dict):
    found = render("instruction", {"instruction": "Add.", "output": "3"} | given, byte_tokenizer)
    assert parts(found) == [("### Instruction:\nAdd.\n\n### Response:\n", False), ("3", True)]


def test_an_instruction_with_input_system_and_history(byte_tokenizer):
    columns = RECORDS["instruction"] | {"system": "Be exact.", "history": [["Hi", "Hello"]]}
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    system, earlier = ("Be exact.\n\n", False), ("### Instruction:\nHi\n\n### Response:\n", False)
    found = render("instruction", columns, byte_tokenizer)
    assert parts(found) == [
        *(system, earlier, ("Hello", True), ("<eos>", True), ("\n\n", False)),
        *((prompt, False), ("3", True)),
    ]
    last = parts(render("instruction", columns, byte_tokenizer, train_on="last"))
    assert [text for text, trained in last if trained] == ["3"]
    assert all(trained for _, trained in parts(render("instruction", columns, byte_tokenizer, train_on="all")))
    plain = copy.deepcopy(byte_tokenizer)
    plain.split_special_tokens = True
    assert "'history' needs the tokenizer's EOS" in message("instruction", columns, plain)
    for history in ("x", [["a"]], [["a", None]]):
        assert "list of pairs" in message("instruction", columns | {"history": history}, byte_tokenizer)


def test_prompt_and_completion_of_messages(byte_tokenizer):
    earlier = [TURNS[0], {"role": "assistant", "content": "5"}, TURNS[0]]
    found = parts(render("prompt_completion", {"prompt": earlier, "completion": TURNS[1:]}, byte_tokenizer))
    assert [text for text, trained in found if trained] == ["4", "<|end|>"]
    assert "".join(text for text, _ in found).count("<|end|>") == 4
    mixed = {"prompt": "2+2?", "completion": TURNS[1:]}
    assert "two strings or two lists of messages" in message("prompt_completion", mixed, byte_tokenizer)


def test_segments_bring_their_own_mask_and_special_tokens(byte_tokenizer):
    columns = {"segments": [{"text": "<bos>a", "label": False}, {"text": "b<eos>", "train": True}]}
    (text,) = render("segments", columns, byte_tokenizer)
    marked = (Segment("<bos>a", False), Segment("b", True), Segment("<eos>", True, ends=True))
    assert text == Text(marked, document=False)
    for wrong in ("x", [], [{"text": "a"}], [{"text": "a", "label": 1}], [{"text": 1, "label": True}], ["a"]):
        assert "segment" in message("segments", {"segments": wrong}, byte_tokenizer)


def test_tokens_with_labels_and_padding(byte_tokenizer):
    columns = {"input_ids": [0, 7, 8, 9, 0], "labels": [-100, -100, 8, 9, -100], "attention_mask": [0, 1, 1, 1, 0]}
    (tokens,) = render("tokens", columns, byte_tokenizer)
    assert isinstance(tokens, Tokens)
    assert (tokens.ids.tolist(), tokens.trained.tolist()) == ([7, 8, 9], [False, True, True])
    assert not tokens.splittable
    (whole,) = render("tokens", {"input_ids": [7, 8]}, byte_tokenizer)
    assert isinstance(whole, Tokens)
    assert np.array_equal(whole.trained, [True, True])
    assert whole.splittable


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"input_ids": [1, 259]}, "holds 259 at place 1, outside the tokenizer's vocabulary of 259"),
        ({"input_ids": [1, -1]}, "holds -1 at place 1"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values and 'input_ids' has 2"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "Do not shift labels"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "1 on one stretch"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 2, 1]}, "1 on one stretch"),
        ({"input_ids": "1 2"}, "list of whole numbers"),
        ({"input_ids": [1, 2.5]}, "list of whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, "list of whole numbers"),
        ({"input_ids": [1, 10**24]}, f"'input_ids' holds {10**24} at place 1"),
        ({"input_ids": [1, 2], "labels": [-(10**9999), 2]}, "'labels' holds a number of 33216 bits at place 0"),
    ],
)
def test_tokens_that_are_none(byte_tokenizer, columns: dict, said: str):
    assert said in message("tokens", columns, byte_tokenizer)


def test_options_that_do_not_apply_are_refused(byte_tokenizer):
    with pytest.raises(UserError, match=r"say themselves what is trained; remove `train_on: all`"):
        render("segments", RECORDS["segments"], byte_tokenizer, train_on="all")
    for option in ({"chat_template": "x"}, {"split_turns": True}, {"template_options": {"a": 1}}):
        for name in ("text", "prompt_completion"):
            assert "is for conversations" in message(name, RECORDS[name], byte_tokenizer, **option)
    both = message("messages", RECORDS["messages"], byte_tokenizer, split_turns=True, train_on="last")
    assert "remove one of the two" in both


def test_a_column_that_is_no_string(byte_tokenizer):
    assert "column 'text' must be a string, not None" in message("text", {"text": None}, byte_tokenizer)
    assert "must be a string, not 3" in message("instruction", {"instruction": "a", "output": 3}, byte_tokenizer)


def test_half_a_surrogate_pair_is_refused(byte_tokenizer):
    assert r"'\ud83d', half of a surrogate pair" in message("text", {"text": "a\ud83d"}, byte_tokenizer)
