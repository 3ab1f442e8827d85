"""Chat templates: the trained tokens decode to exactly what the assistant says and the end of its turn."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig, read
from jaxllm.data.rows.store import open_or_build
from jaxllm.data.text.chat import RenderConfig
from jaxllm.data.text.formats import Renderer
from jaxllm.data.text.segments import Text
from jaxllm.data.text.tokenize import Encoded, Encoder
from tests.support.chat_templates import (
    CHATML,
    FORGETTING,
    LAST_MARK,
    MARKED,
    MOVING_SYSTEM,
    STYLES,
    THINKING_PROMPT,
    Style,
)

SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [
    {"role": "user", "content": "What is 2+2? "},
    {"role": "assistant", "content": "It is 4.\n\nReally: four 🙂"},
    {"role": "user", "content": "Sure?\n"},
    {"role": "assistant", "content": "Yes"},
]
TOKENIZERS = ["tokenizers/qwen2.5", "tokenizers/gpt2", "tokenizers/llama2"]


def tokenizer_for(folder: Path, style: Style) -> PreTrainedTokenizerFast:
    """A real tokenizer with the style's template, marks, BOS and EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<s>", "</s>", *style.marks)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", "</s>", "</s>"
    tokenizer.chat_template = style.template
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.fixture(scope="module")
def chatml(byte_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|return|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def encode(tokenizer, messages: list[dict], *, tools=None, **options) -> list[Encoded]:
    renderer = Renderer("messages", RenderConfig(**options), tokenizer, detected=False)
    return Encoder(tokenizer).encode(renderer({"messages": messages, "tools": tools}))


def trained(tokenizer, messages: list[dict], **options) -> list[str]:
    """What is trained of each sample."""
    samples = [encoded.sample for encoded in encode(tokenizer, messages, **options)]
    return [tokenizer.decode(sample.ids[sample.trained]) for sample in samples]


def message(tokenizer, messages: list[dict], **options) -> str:
    with pytest.raises(UserError) as caught:
        encode(tokenizer, messages, **options)
    return str(caught.value)


# GPT-2 reads the two line ends before an answer otherwise than at the end of a text.
ASKED_OTHERWISE = ("llama-3", "tokenizers/gpt2")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_trains_what_is_said_and_the_end_of_each_turn_once(shared: Path, style: str, name: str):
    chosen = STYLES[style]
    tokenizer = tokenizer_for(shared / "models" / name, chosen)
    messages = [SYSTEM, *TURNS] if chosen.system else TURNS
    (encoded,) = encode(tokenizer, messages)
    ids, mask = encoded.sample
    assert ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    # A SentencePiece token holds the space in front of its word.
    assert tokenizer.decode(ids[mask]).replace(" Yes", "Yes").lstrip() == chosen.end.join([*said, ""])
    end = tokenizer.convert_tokens_to_ids(chosen.end.strip())
    assert (ids[mask] == end).sum() == len(said)
    assert ids[encoded.end] == end
    assert encoded.torn == ((style, name) == ASKED_OTHERWISE)
    if chosen.bos and style != "llama-2":
        assert (ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0]
    # What the model is given at generation is what stands before the trained tokens.
    for i in [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]:
        asked = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        assert (ids[: len(asked)].tolist() == asked) != encoded.torn
        assert encoded.torn or (not mask[len(asked) - 1] and mask[len(asked)])


def test_marked_spans_are_those_of_transformers(shared: Path):
    tokenizer = tokenizer_for(shared / "models/tokenizers/qwen2.5", STYLES["marked chatml"])
    unmarking = with_template(tokenizer, CHATML)
    for record, _ in zip(read(SourceConfig(path=str(shared / "data/sgd_chat/dev.jsonl"))), range(30), strict=False):
        messages = record.columns["messages"]
        (encoded,) = encode(tokenizer, messages)
        reference = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert encoded.sample.ids.tolist() == reference["input_ids"]
        assert encoded.sample.trained.tolist() == [bool(flag) for flag in reference["assistant_masks"]]
        (unmarked,) = encode(unmarking, messages)
        assert np.array_equal(unmarked.sample.trained, encoded.sample.trained)


def test_last_and_all(chatml):
    first, last = f"{TURNS[1]['content']}<|im_end|>", "Yes<|im_end|>"
    assert trained(chatml, TURNS) == [first + last]
    assert trained(chatml, TURNS, train_on="last") == [last]
    (encoded,) = encode(chatml, TURNS, train_on="all")
    assert encoded.sample.trained[:-1].all()
    assert not encoded.sample.trained[-1]  # the line end behind the last mark
    more = [*TURNS, {"role": "user", "content": "Ok"}]
    assert trained(chatml, more, train_on="last") == [last]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_messages_that_are_not_to_be_trained(chatml, flag: dict):
    kept_out = [TURNS[0], TURNS[1] | flag, *TURNS[2:]]
    assert trained(chatml, kept_out) == ["Yes<|im_end|>"]
    assert trained(with_template(chatml, MARKED), kept_out) == ["Yes<|im_end|>"]
    (everything,) = trained(chatml, kept_out, train_on="all")
    assert "four" not in everything
    assert "Sure" in everything
    assert trained(chatml, [*TURNS[:3], TURNS[3] | flag], train_on="last") == [""]
    assert trained(chatml, [TURNS[0], TURNS[1] | {"train": True, "weight": 1}]) == trained(chatml, TURNS[:2])


def test_rewritten_turns_are_refused_and_trained_one_by_one(chatml):
    thoughts = [
        *(TURNS[0], {"role": "assistant", "content": "<think>\nsums\n</think>\n\n4"}),
        *(TURNS[2], {"role": "assistant", "content": "<think>\nagain\n</think>\n\nYes"}),
    ]
    forgetting = with_template(chatml, FORGETTING)
    said = message(forgetting, thoughts)
    assert "rewrites earlier turns" in said
    assert "`split_turns: true`" in said
    assert "message 2" in said
    each = [f"{turn['content']}<|im_end|>" for turn in thoughts if turn["role"] == "assistant"]
    assert trained(forgetting, thoughts, split_turns=True) == each
    assert trained(forgetting, thoughts, train_on="last") == each[1:]
    second = encode(forgetting, thoughts, split_turns=True)[1].sample
    assert second.ids.tolist() == forgetting.apply_chat_template(thoughts, return_dict=False)
    first = encode(forgetting, thoughts, split_turns=True)[0].sample
    assert first.ids.tolist() == forgetting.apply_chat_template(thoughts[:2], return_dict=False)
    one = [thoughts[0], thoughts[1] | {"train": False}, *thoughts[2:]]
    assert trained(forgetting, one, split_turns=True) == each[1:]


def test_another_mark_on_the_last_turn_is_a_rewritten_turn(chatml):
    assert "four 🙂<|return|>' where it writes 'ly: four 🙂<|im_end|>" in message(
        with_template(chatml, LAST_MARK), TURNS
    )
    each = trained(with_template(chatml, LAST_MARK), TURNS, split_turns=True)
    assert each == [f"{TURNS[1]['content']}<|return|>", "Yes<|return|>"]


def test_a_moving_system_message_is_a_rewritten_turn(shared: Path):
    tokenizer = tokenizer_for(shared / "models/tokenizers/qwen2.5", STYLES["mistral"])
    tokenizer.chat_template = MOVING_SYSTEM
    assert "rewrites earlier turns" in message(tokenizer, [SYSTEM, *TURNS])
    assert trained(tokenizer, [SYSTEM, *TURNS], split_turns=True) == [f"{TURNS[1]['content']}</s>", "Yes</s>"]


def test_a_marked_template_that_leaves_out_what_is_said_is_refused_and_split(chatml):
    forgetting = with_template(
        chatml, MARKED.replace("m.content + '<|im_end|>'", "(m.content if loop.last else '') + '<|im_end|>'")
    )
    assert "leaves out or changes what the assistant says in message 2" in message(forgetting, TURNS)
    assert trained(forgetting, TURNS, split_turns=True)[1] == "Yes<|im_end|>"


def test_a_prompt_that_differs_from_the_finished_turn(chatml):
    thinking = with_template(chatml, THINKING_PROMPT)
    said = message(thinking, TURNS)
    assert "opens the reasoning, by '<think>', when it asks for an answer" in said
    assert "message 2 has none" in said
    # A turn that is written as the prompt opens it is trained from there on.
    opened = [TURNS[0], {"role": "assistant", "content": "<think>\nsums\n</think>4"}]
    assert trained(thinking, opened) == ["sums\n</think>4<|im_end|>"]


def test_template_options_reach_the_template(chatml):
    optional = with_template(chatml, THINKING_PROMPT.replace("<think>\n", "' + ('<think>\n' if think else '') + '"))
    assert trained(optional, TURNS[:2], template_options={"think": False}) == trained(chatml, TURNS[:2])
    assert "<think>" in message(optional, TURNS[:2], template_options={"think": True})


def test_a_template_file_comes_before_the_tokenizers(chatml, tmp_path: Path):
    bare = with_template(chatml, "")
    bare.chat_template = None
    assert "`chat_template:`" in message(bare, TURNS)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("<|im_end|>", "<|return|>"))
    assert trained(bare, TURNS[2:], chat_template=str(file)) == ["Yes<|return|>"]
    assert trained(chatml, TURNS[2:], chat_template=str(file)) == ["Yes<|return|>"]
    assert "cannot be read: No such file" in message(bare, TURNS, chat_template=str(tmp_path / "none.jinja"))
    file.write_text(" ")
    assert "is empty" in message(bare, TURNS, chat_template=str(file))


def test_another_template_file_is_another_store(chatml, tmp_path: Path, write_lines):
    file = tmp_path / "mine.jinja"
    path = write_lines([{"messages": TURNS[2:]}])
    config = SourceConfig(path=path, chat_template=str(file))
    folders = set()
    for end in ("<|im_end|>", "<|return|>"):
        # Both write the first record alike.
        file.write_text(CHATML + "{% if messages | length > 9 %}" + end + "{% endif %}")
        folders.add(open_or_build([config], chatml, cache=tmp_path, progress=False).folder)
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}\n{{ m.nothing.at_all }}{% endfor %}", "at line 2: "),
        ("\n\n{% for %}", "at line 3: "),
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "cannot write this conversation at line 1"),
    ],
)
def test_a_template_that_fails(chatml, template: str, said: str):
    assert said in message(with_template(chatml, template), TURNS)


def test_the_record_at_which_a_template_fails_is_named(chatml, write_lines, tmp_path: Path):
    strict = with_template(
        chatml, CHATML + "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    path = write_lines([{"messages": TURNS}, {"messages": [SYSTEM, *TURNS]}])
    with pytest.raises(
        UserError, match=r"data.jsonl, line 2: the tokenizer's chat template .* at line \d+: user first"
    ):
        open_or_build([SourceConfig(path=path)], strict, cache=tmp_path / "cache", progress=False)


def test_a_template_that_drops_or_changes_what_is_said(chatml):
    assert "leaves out or changes what message 1 of the system says" in message(
        with_template(chatml, CHATML.replace("m['content']", "(m['content'] if m['role'] != 'system' else '')")),
        [SYSTEM, *TURNS],
    )
    assert "what the assistant says in message 2" in message(
        with_template(chatml, CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")),
        [TURNS[0], {"role": "assistant", "content": "<think>a</think>b"}],
    )
    reasoned = [TURNS[0], {"role": "assistant", "content": "4", "reasoning_content": "sums"}]
    assert "what the assistant says in message 2 ('sums')" in message(chatml, reasoned)


def test_a_template_that_does_not_open_the_turn(chatml):
    closed = CHATML.partition("{% if add_generation_prompt")[0]
    assert "'<|im_start|>assistant', which the model is given, would be trained" in message(
        with_template(chatml, closed), TURNS
    )


def test_marks_that_leave_out_a_turn_or_its_end(chatml, write_lines, tmp_path: Path):
    partly = MARKED.replace("{%- if m.role == 'assistant' %}", "{%- if m.role == 'assistant' and loop.index > 2 %}")
    assert "leave out message 2" in message(with_template(chatml, partly), TURNS)
    endless = with_template(chatml, MARKED.replace("{{- m.content + '<|im_end|>' }}", "{{- m.content }}"))
    assert [encoded.end for encoded in encode(endless, TURNS)] == [-1]
    path = write_lines([{"messages": TURNS}] * 2)
    with pytest.raises(
        UserError, match=r"the end of a turn is never trained in .*data.jsonl.*inside \{% generation %\}"
    ):
        open_or_build([SourceConfig(path=path)], endless, cache=tmp_path / "cache", progress=False)


def test_an_end_that_only_separates_turns_is_never_trained(chatml):
    between = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}"
    )
    (encoded,) = encode(with_template(chatml, between), TURNS)
    assert encoded.end == -1


def test_an_end_of_plain_text_counts(byte_tokenizer):
    plain = with_template(byte_tokenizer, CHATML.replace("<|im_end|>", "[end]").replace("<|im_start|>", "[start]"))
    (encoded,) = encode(plain, TURNS)
    ids, mask = encoded.sample
    assert plain.decode(ids[encoded.end : encoded.end + 5]) == "[end]"
    assert plain.decode(ids[mask]).startswith(TURNS[1]["content"] + "[end]\n")


def test_marks_that_share_a_token_with_what_they_mark(shared: Path, write_lines, tmp_path: Path):
    gpt2 = AutoTokenizer.from_pretrained(shared / "models/tokenizers/gpt2")
    gpt2.chat_template = CHATML.replace("<|im_end|>\n", "<end>").replace("<|im_start|>", "<start>")
    (encoded,) = encode(gpt2, TURNS)
    assert encoded.torn  # GPT-2 has a token "><"
    path = write_lines([{"messages": TURNS}] * 2)
    with pytest.raises(
        UserError,
        match=r"nothing is trained .* each of 2 samples, such as .*line 1, a trained turn begins or ends inside",
    ):
        open_or_build([SourceConfig(path=path)], gpt2, cache=tmp_path / "cache", progress=False)


def test_a_sample_whose_turn_begins_inside_a_token_is_left_out(shared: Path, write_lines, tmp_path: Path):
    qwen = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    begins = {"role": "assistant", "content": "\n\nYes"}
    path = write_lines([{"messages": TURNS}, {"messages": [TURNS[0], begins]}])
    store = open_or_build([SourceConfig(path=path)], qwen, cache=tmp_path / "cache", progress=False)
    assert (len(store), store.summary.torn) == (1, 1)
    assert "1 samples left out: a trained turn begins or ends inside a token (first: " in str(store.summary)
    assert "data.jsonl, line 2)" in str(store.summary)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"role": "user", "content": "Rain in Rome?"},
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"in": "Rom"}}}],
    },
    {"role": "tool", "content": '{"rain": false}'},
    {"role": "assistant", "content": "No rain."},
]


@pytest.mark.parametrize("form", [lambda tools: tools, json.dumps])
def test_tools_and_their_calls_reach_the_template(shared: Path, form):
    qwen = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    (encoded,) = encode(qwen, CALLS, tools=form([WEATHER]))
    ids, mask = encoded.sample
    assert ids.tolist() == qwen.apply_chat_template(CALLS, tools=[WEATHER], tokenize=True, return_dict=False)
    call = '<tool_call>\n{"name": "weather", "arguments": {"in": "Rom"}}\n</tool_call><|im_end|>'
    assert qwen.decode(ids[mask]) == f"{call}No rain.<|im_end|>"


def test_arguments_written_as_json_are_the_same_call(shared: Path):
    qwen = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    texts = copy.deepcopy(CALLS)
    texts[1]["tool_calls"][0]["function"]["arguments"] = '{"in": "Rom"}'
    texts[1]["content"] = None
    assert encode(qwen, texts)[0].sample.ids.tolist() == encode(qwen, CALLS)[0].sample.ids.tolist()


def test_a_template_without_tools(chatml):
    assert "does not write the tool 'weather'" in message(chatml, TURNS, tools=[WEATHER])
    forgiving = with_template(chatml, CHATML.replace("m['content']", "(m['content'] or '')"))
    assert "what the assistant says in message 2 ('weather')" in message(forgiving, CALLS)
    assert "'tools' is not JSON" in message(chatml, TURNS, tools="[{")
    assert "list of JSON schemas" in message(chatml, TURNS, tools=["weather"])
    for none in (None, "", "[]", []):
        assert trained(chatml, TURNS, tools=none) == trained(chatml, TURNS)


def test_sharegpt_conversations_are_the_same_chat(shared: Path):
    qwen = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    call = {"name": "weather", "arguments": {"in": "Rom"}}
    turns = [
        {"from": "human", "value": "Rain in Rome?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": '{"rain": false}'},
        {"from": "gpt", "value": "No rain."},
    ]
    columns = {"conversations": turns, "tools": json.dumps([WEATHER]), "system": "Be short."}
    renderer = Renderer("conversations", RenderConfig(), qwen, detected=True)
    (encoded,) = Encoder(qwen).encode(renderer(columns))
    (same,) = encode(qwen, [SYSTEM, *CALLS], tools=[WEATHER])
    assert encoded.sample.ids.tolist() == same.sample.ids.tolist()
    assert encoded.sample.trained.tolist() == same.sample.trained.tolist()


def test_real_tool_calling_conversations(shared: Path):
    qwen = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    path = str(shared / "data/chat_sharegpt/glaive_toolcall_en_demo.json")
    renderer = Renderer("conversations", RenderConfig(), qwen, detected=True)
    records = [record.columns for record, _ in zip(read(SourceConfig(path=path)), range(60), strict=False)]
    for record in records:
        (encoded,) = Encoder(qwen).encode(renderer(record))
        ids, mask = encoded.sample
        pieces = qwen.decode(ids[mask]).split("<|im_end|>")
        said = [turn for turn in record["conversations"] if turn["from"] in ("gpt", "function_call")]
        assert len(pieces) == len(said) + 1
        for turn, piece in zip(said, pieces, strict=False):
            if turn["from"] == "gpt":
                assert piece == turn["value"]
            else:
                body = piece.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
                assert json.loads(body) == json.loads(turn["value"])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one"),
        ("hi", "list of messages"),
        ([{"content": "x"}], "message 1 must be an object with a `role`"),
        ([TURNS[0], {"role": "assistant", "content": 4}], "message 2: `content` must be a string"),
        ([TURNS[0], {"role": "assistant"}], "message 2: `content` must be a string, not None"),
        ([TURNS[0], {"role": "assistant", "content": " "}], "message 2: the assistant says nothing"),
        (TURNS[1:], "first message is the assistant's"),
        ([TURNS[0], TURNS[1] | {"weight": 0.5}], "`weight` must be 0 or 1"),
        ([TURNS[0], TURNS[1] | {"train": "no"}], "`train` must be true or false"),
        ([TURNS[0], TURNS[1] | {"train": True, "weight": 0}], "contradict"),
        ([TURNS[0] | {"train": True}, TURNS[1]], "only the assistant's messages"),
        ([TURNS[0], TURNS[1] | {"training": False}], "is said by `train`"),
        ([TURNS[0], {"role": "assistant", "tool_calls": [{}]}], "needs a `function` with a `name`"),
        ([TURNS[0], {"role": "assistant", "tool_calls": "x"}], "`tool_calls` must be a list"),
        *(
            ([TURNS[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": text}]}], f"not JSON: {said}")
            for text, said in (
                ("[" * 5000, "its lists or objects are nested too deeply"),
                (f"[{'9' * 5000}]", "a whole number has thousands of digits"),
                ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
            )
        ),
    ],
)
def test_messages_that_are_none(chatml, messages, said: str):
    assert said in message(chatml, messages)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("hi", "list of turns"),
        ([{"role": "user"}], "turn 1 must be an object with `from` and `value`"),
        ([{"from": "humans", "value": "a"}], "turn 1 is from 'humans'. Did you mean 'human'?"),
        ([{"from": "human", "value": 1}], "turn 1: `value` must be a string"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "mask": True}], "is said by `train`"),
        ([{"from": "function_call", "value": "x"}], "must be JSON"),
        ([{"from": "function_call", "value": "[]"}], '{"name": …, "arguments": …}'),
    ],
)
def test_conversations_that_are_none(chatml, turns, said: str):
    renderer = Renderer("conversations", RenderConfig(), chatml, detected=False)
    with pytest.raises(UserError) as caught:
        renderer({"conversations": turns})
    assert said in str(caught.value)


def test_a_system_column_stands_before_the_messages(chatml):
    renderer = Renderer("messages", RenderConfig(), chatml, detected=False)
    (text,) = renderer({"messages": TURNS, "system": "Be short."})
    assert isinstance(text, Text)
    assert str(text) == chatml.apply_chat_template([SYSTEM, *TURNS], tokenize=False)
    with pytest.raises(UserError, match="a column 'system' and a system message"):
        renderer({"messages": [SYSTEM, *TURNS], "system": "Be short."})


def test_a_tokenizer_that_reads_the_marks_as_text_is_refused(chatml):
    plain = copy.deepcopy(chatml)
    plain.split_special_tokens = True
    assert '"split_special_tokens": false' in message(plain, TURNS)


def test_a_conversation_without_an_answer_trains_nothing(chatml):
    assert trained(chatml, TURNS[:1]) == [""]
    assert trained(chatml, TURNS[:1], split_turns=True) == []
