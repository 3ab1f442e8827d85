"""What is trained ends with the turn: not with the prompt for the next one, nor before what the model generates."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from jaxllm.core.errors import UserError
from jaxllm.data.text.chat import RenderConfig
from jaxllm.data.text.formats import Renderer
from tests.support.chat_templates import CHATML, LAST_MARK, MARKED

ONE = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "four"}]
TWO = [*ONE, {"role": "user", "content": "Human: sure?"}, {"role": "assistant", "content": "assistant"}]
SYSTEM = {"role": "system", "content": "Be short."}
PROMPT = "{{ '<|im_start|>assistant\n' }}"
TURNS, _, _ = CHATML.partition("{% if add_generation_prompt %}")


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_tokenizer)
    marks = ["<|im_start|>", "<|im_end|>", "<|return|>", "<|user|>", "<|assistant|>", "<|sys|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def trained(tokenizer, template: str, messages: list[dict], **options) -> list[str]:
    tokenizer.chat_template = template
    renderer = Renderer("messages", RenderConfig(**options), tokenizer, detected=False)
    return [
        "".join(segment.text for segment in sample.segments if segment.trained)
        for sample in renderer({"messages": messages})
    ]


def refusal(tokenizer, template: str, messages: list[dict], **options) -> str:
    with pytest.raises(UserError) as caught:
        trained(tokenizer, template, messages, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "behind",
    [
        PROMPT,  # asked for or not
        "{% if messages[-1].role == 'assistant' %}{{ '<|im_start|>user\n' }}{% endif %}"  # what a user says next
        "{% if add_generation_prompt %}" + PROMPT + "{% endif %}",
        # A mark that only closes the conversation.
        "{% if add_generation_prompt %}" + PROMPT + "{% else %}<eos>{% endif %}",
    ],
)
@pytest.mark.parametrize("messages", [ONE, [SYSTEM, *ONE], TWO, [SYSTEM, *TWO]])
def test_what_stands_behind_the_last_turn_is_not_trained(tokenizer, behind: str, messages: list[dict]):
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    assert trained(tokenizer, TURNS + behind, messages) == ["".join(f"{said}<|im_end|>" for said in answers)]


def test_the_beginning_of_the_next_round_is_not_trained(tokenizer):
    rounds = (
        "{% for m in messages %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + "
        "m.content + eos_token }}{% endfor %}{% if messages[-1].role == 'assistant' %}{{ bos_token }}{% endif %}"
    )
    assert trained(tokenizer, rounds, TWO) == [" four<eos> assistant<eos>"]


@pytest.mark.parametrize(
    "template",
    [
        # No mark ends the answer, and what follows it is the prompt for the next one.
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>",
        "{% for m in messages %}\n\n### {{ m.role }}: {{ m.content }}{% endfor %}\n\n### assistant: ",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}user: "
        "{% if add_generation_prompt %}assistant: {% endif %}",
        # What both prompts begin with may end the answer or open the next turn.
        "<|sys|>hi{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "<|im_start|>assistant\n",
    ],
)
def test_an_end_that_cannot_be_told_is_refused(tokenizer, template: str):
    said = refusal(tokenizer, template, ONE)
    assert "cannot be told" in said
    assert "`{% if add_generation_prompt %}`" in said or "{% generation %} blocks" in said


def test_an_end_of_its_own_for_the_last_turn_is_trained_there_alone(tokenizer):
    assert trained(tokenizer, LAST_MARK, ONE) == ["four<|return|>"]
    assert "rewrites earlier turns" in refusal(tokenizer, LAST_MARK, TWO)
    assert trained(tokenizer, LAST_MARK, TWO, split_turns=True) == ["four<|return|>", "assistant<|return|>"]


# The reasoning of earlier turns is left out, the last turn has another mark, and the date is written behind all.
TRUSTED = (
    MARKED.replace("m.content + '<|im_end|>'", "(m.content if loop.last else m.content.split('</think>')[-1]) + end")
    .replace("{%- generation", "{%- set end = '<|return|>' if loop.last else '<|im_end|>' %}{%- generation")
    .replace("{%- if add_generation_prompt", "{{- messages | length }}{%- if add_generation_prompt")
)


def test_marks_are_trusted_where_a_template_rewrites_what_it_wrote(tokenizer):
    thinking = [ONE[0], {"role": "assistant", "content": "<think>sums</think>four"}, *TWO[2:]]
    assert trained(tokenizer, TRUSTED, thinking) == ["four<|im_end|>assistant<|return|>"]
    assert trained(tokenizer, TRUSTED, thinking, train_on="last") == ["assistant<|return|>"]
    kept_out = [*TWO[:3], TWO[3] | {"train": False}]
    assert trained(tokenizer, TRUSTED, kept_out) == ["four<|im_end|>"]
    assert trained(tokenizer, TRUSTED, thinking, split_turns=True)[0] == "<think>sums</think>four<|return|>"


def test_a_message_may_have_several_blocks(tokenizer):
    twice = MARKED.replace(
        "{{- m.content + '<|im_end|>' }}",
        "{{- m.content }}{%- endgeneration %}{{- ' ' }}{%- generation %}{{- '<|im_end|>' }}",
    )
    assert trained(tokenizer, twice, TWO) == ["four<|im_end|>assistant<|im_end|>"]
    assert trained(tokenizer, twice, TWO, train_on="last") == ["assistant<|im_end|>"]


# As QwQ writes it: the prompt opens the reasoning, and what is finished has none.
QWQ = CHATML.replace("m['content'] + '<|im_end|>", "m['content'].split('</think>')[-1].lstrip() + '<|im_end|>").replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)
GENERATED = "sums\n</think>\n\nfour<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "generated"),
    [
        ({"content": "<think>\nsums\n</think>\n\nfour"}, GENERATED),
        ({"content": "sums\n</think>\n\nfour"}, GENERATED),  # the prompt's mark is no part of the answer
        ({"content": "four", "reasoning_content": "sums\n"}, GENERATED),
        ({"content": "<think>\n\n</think>\n\nfour"}, "</think>\n\nfour<|im_end|>"),
        ({"content": "four", "reasoning_content": ""}, "</think>\n\nfour<|im_end|>"),
    ],
)
def test_behind_a_prompt_that_opens_the_reasoning_what_is_generated_is_trained(tokenizer, answer, generated: str):
    messages = [ONE[0], {"role": "assistant", **answer}]
    tokenizer.chat_template = QWQ
    (sample,) = Renderer("messages", RenderConfig(), tokenizer, detected=False)({"messages": messages})
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("assistant\n<think>\n")
    assert str(sample) == asked + generated + "\n"
    assert trained(tokenizer, QWQ, messages) == [generated]


def test_reasoning_of_several_turns_is_trained_turn_by_turn(tokenizer):
    messages = [*ONE, TWO[2], {"role": "assistant", "content": "<think>\nagain\n</think>\n\nyes"}]
    assert "message 2 has none" in refusal(tokenizer, QWQ, messages)
    assert trained(tokenizer, QWQ, messages, train_on="last") == ["again\n</think>\n\nyes<|im_end|>"]
    messages[1] = {"role": "assistant", "content": "<think>\nsums\n</think>\n\nfour"}
    assert "`split_turns: true`" in refusal(tokenizer, QWQ, messages)
    assert trained(tokenizer, QWQ, messages, split_turns=True) == [GENERATED, "again\n</think>\n\nyes<|im_end|>"]


AS_JSON = "{{ call.arguments | tojson }}"
AS_TEXT = "{{ '' + call.arguments }}"
AS_EITHER = "{{ call.arguments if call.arguments is string else call.arguments | tojson }}"
BY_KEY = "{% for key, value in call.arguments.items() %}<{{ key }}>{{ value }}{% endfor %}"
CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.name }}(ARGUMENTS){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("arguments", "given", "written"),
    [
        (AS_JSON, '{"n":2}', '{"n": 2}'),
        (AS_JSON, {"n": 2}, '{"n": 2}'),
        (AS_TEXT, '{"n":2}', '{"n":2}'),
        (AS_TEXT, {"n": 2}, '{"n": 2}'),
        (AS_EITHER, '{"n":2}', '{"n":2}'),
        (AS_EITHER, {"n": 2}, '{"n": 2}'),
        (BY_KEY, '{"n":2}', "<n>2"),
    ],
)
def test_arguments_reach_a_template_as_it_takes_them(tokenizer, arguments: str, given, written: str):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "sum", "arguments": given}]}
    assert trained(tokenizer, CALLING.replace("ARGUMENTS", arguments), [ONE[0], call]) == [f"sum({written})<|im_end|>"]
