"""Each format renders its columns into trained and untrained text, and says what does not fit."""

import copy

import pytest

from jaxllm.core.errors import UserError
from jaxllm.data.template import FORMATS, Segment, detect, render

TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes"},
]


def message(name: str, columns: dict, tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        render(name, columns, tokenizer)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["text", "id"], "text"),
        (["completion", "prompt"], "prompt_completion"),
        (["instruction", "input", "output"], "instruction"),
        (["instruction", "output"], "instruction"),
        (["dialogue_id", "messages"], "messages"),
    ],
)
def test_the_format_is_told_from_the_columns(columns: list[str], name: str):
    assert detect(columns) == name


def test_columns_that_fit_two_formats_or_none():
    with pytest.raises(UserError, match=r"more than one format \(text, instruction\); choose one by `format:`"):
        detect(["instruction", "output", "text"])
    with pytest.raises(UserError, match=r"Did you mean 'completion'\?.*fields.*prompt_completion: prompt, completion"):
        detect(["question", "completions"])


def test_every_format_names_a_missing_column(byte_tokenizer):
    for name in FORMATS:
        first = FORMATS[name].columns[0]
        text = message(name, {first + "s": "x"}, byte_tokenizer)
        assert f"needs the column {first!r}. Did you mean '{first}s'?" in text


def test_text_is_all_trained(byte_tokenizer):
    assert render("text", {"text": "abc"}, byte_tokenizer) == [Segment("abc", True)]


def test_a_prompt_is_not_trained(byte_tokenizer):
    found = render("prompt_completion", {"prompt": "a ", "completion": "b"}, byte_tokenizer)
    assert found == [Segment("a ", False), Segment("b", True)]


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_an_instruction_without_input(byte_tokenizer, given: dict):
    found = render("instruction", {"instruction": "Add.", "output": "3"} | given, byte_tokenizer)
    assert found == [Segment("### Instruction:\nAdd.\n\n### Response:\n", False), Segment("3", True)]


def test_an_instruction_with_input(byte_tokenizer):
    found = render("instruction", {"instruction": "Add.", "input": "1 2", "output": "3"}, byte_tokenizer)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert found == [Segment(prompt, False), Segment("3", True)]


def test_what_the_assistant_says_is_trained_with_the_end_of_its_turn(byte_tokenizer):
    found = render("messages", {"messages": [*TURNS, {"role": "user", "content": "Ok"}]}, byte_tokenizer)
    assert [segment.text for segment in found if segment.trained] == ["4<|end|>", "Yes<|end|>"]
    whole = "<|user|>2+2?<|end|><|assistant|>4<|end|><|user|>Sure?<|end|><|assistant|>Yes<|end|><|user|>Ok<|end|>"
    assert "".join(segment.text for segment in found) == whole


def test_messages_need_a_chat_template(byte_tokenizer):
    bare = copy.deepcopy(byte_tokenizer)
    bare.chat_template = None
    assert "chat_template.jinja" in message("messages", {"messages": TURNS}, bare)


def test_a_tokenizer_that_reads_the_marks_as_text_is_refused(byte_tokenizer):
    plain = copy.deepcopy(byte_tokenizer)
    plain.split_special_tokens = True
    assert '"split_special_tokens": false' in message("messages", {"messages": TURNS}, plain)


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_tokenizer):
    rewriting = copy.deepcopy(byte_tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert "rewrites earlier turns (message 2" in message("messages", {"messages": TURNS}, rewriting)
    one_turn = render("messages", {"messages": TURNS[:2]}, rewriting)
    assert [segment.text for segment in one_turn if segment.trained] == ["4<|end|>"]


def test_what_a_template_refuses_is_said(byte_tokenizer):
    strict = copy.deepcopy(byte_tokenizer)
    strict.chat_template = "{{ raise_exception('no system role here') }}"
    assert "no system role here" in message("messages", {"messages": TURNS}, strict)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"messages": []}, "at least one"),
        ({"messages": "hi"}, "list of messages"),
        ({"messages": [{"content": "x"}]}, "message 1 must be an object with a `role`"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 4}]}, "message 2: `content` must be a string"),
        ({"messages": TURNS[1:]}, "first message is the assistant's"),
    ],
)
def test_messages_that_are_none(byte_tokenizer, columns: dict, said: str):
    assert said in message("messages", columns, byte_tokenizer)


def test_a_column_that_is_no_string(byte_tokenizer):
    assert "column 'text' must be a string, not None" in message("text", {"text": None}, byte_tokenizer)
    assert "must be a string, not 3" in message("instruction", {"instruction": "a", "output": 3}, byte_tokenizer)


def test_half_a_surrogate_pair_is_refused(byte_tokenizer):
    assert r"'\ud83d', half of a surrogate pair" in message("text", {"text": "a\ud83d"}, byte_tokenizer)


def test_the_chat_of_a_real_template(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    found = render("messages", {"messages": TURNS}, tokenizer)
    assert "".join(segment.text for segment in found) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert [segment.text for segment in found if segment.trained] == ["4<|im_end|>\n", "Yes<|im_end|>\n"]
