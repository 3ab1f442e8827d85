"""Chat templates as their publishers wrote them: the text equals transformers' text. The assistant's words and the end
of its turn are trained, or the template is refused for a reason that is true of its text."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxllm.core.errors import UserError
from jaxllm.data.text.chat import RenderConfig
from jaxllm.data.text.formats import Renderer
from jaxllm.data.text.segments import Text

MARKS = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?s>|</?seed:[a-z_]+>|<SPECIAL_\d+>|<(?:start|end)_of_turn>")
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
CHATML_END = "<|im_end|>"


class Published(NamedTuple):
    """What a template makes of a turn: `begin`, which the model writes before its words, and `end`.

    `splits`: it writes the last turn otherwise than earlier ones. `thinks`: its prompt opens the reasoning, which it
    leaves out of what it writes. `call`: what it writes of a call of a tool; empty: it is refused, for `no_call`.
    """

    end: str
    begin: str = ""
    splits: bool = False
    thinks: bool = False
    call: str = ""
    no_call: str = "does not write the tool 'get_weather'"


JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
LLAMA_3 = Published("<|eot_id|>", call='{"name": "get_weather", "parameters": {"city": "Oslo"}}<|eot_id|>')
PUBLISHED = {
    "ByteDance-Seed-OSS": Published(
        "<seed:eos>",
        call="<seed:tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</seed:tool_call>"
        "<seed:eos>",
    ),
    "ChatGLM3": Published("", begin=" \n "),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": Published(
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        begin="<|START_RESPONSE|>",
        call='<|START_THINKING|><|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather"'
        ', "parameters": {"city": "Oslo"}}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>',
    ),
    "InternVL2": Published(CHATML_END),
    "Megrez": Published("<|turn_end|>"),
    "MiniCPM4": Published(CHATML_END),
    "Mistral": Published("</s>", no_call="roles must alternate"),
    "NVIDIA-Nemotron-Nano-v2": Published("\n<SPECIAL_12>", splits=True, no_call="opens the reasoning, by '<think>'"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": Published(CHATML_END, no_call="when it asks for an answer"),
    "Qwen-Qwen2.5-7B-Instruct": Published(CHATML_END, call=f"<tool_call>\n{JSON_CALL}\n</tool_call>{CHATML_END}"),
    "Qwen2": Published(CHATML_END),
    "Qwen3": Published(
        CHATML_END,
        begin="<think>\n\n</think>\n\n",
        splits=True,
        call=f"<think>\n\n</think>\n\n<tool_call>\n{JSON_CALL}\n</tool_call>{CHATML_END}",
    ),
    "Yi": Published(CHATML_END),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": Published(DEEPSEEK_END, splits=True, thinks=True),
    "deepseek-ai-DeepSeek-V3.1": Published(
        DEEPSEEK_END,
        call='<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
        f"<｜tool▁calls▁end｜>{DEEPSEEK_END}",
    ),
    "google-gemma-2-2b-it": Published("<end_of_turn>", no_call="roles must alternate"),
    "llama-cpp-deepseek-r1": Published(DEEPSEEK_END, splits=True, thinks=True, no_call="not JSON serializable"),
    "meetkai-functionary-medium-v3.1": Published(
        "<|eot_id|>", call='<function=get_weather>{"city": "Oslo"}</function><|eom_id|>'
    ),
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA_3,
    "meta-llama-Llama-3.3-70B-Instruct": LLAMA_3,
    "mistralai-Mistral-Nemo-Instruct-2407": Published(
        "</s>", call=f'[TOOL_CALLS][{JSON_CALL[:-1]}, "id": "abcdef123"}}]</s>'
    ),
    "openai-gpt-oss-120b": Published(
        "<|return|>",
        begin="<|channel|>final<|message|>",
        splits=True,
        call=' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
    ),
}

SYSTEM = {"role": "system", "content": "Be short."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with the marks of all templates."""
    texts = [(shared / "published/templates" / f"{name}.jinja").read_text(encoding="utf-8") for name in PUBLISHED]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    marks = sorted({"<s>", "</s>", *MARKS.findall("".join(texts))})
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    return tokenizer


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, shared: Path, tokenizer) -> tuple[Published, PreTrainedTokenizerFast]:
    template = (shared / "published/templates" / f"{request.param}.jinja").read_text(encoding="utf-8")
    end = DEEPSEEK_END if DEEPSEEK_END in template else "</s>"
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", end, template
    return PUBLISHED[request.param], tokenizer


def samples(tokenizer, messages: list[dict], tools: list[dict] | None = None, **options: Any) -> list[Text]:
    renderer = Renderer("messages", RenderConfig(**options), tokenizer, detected=False)
    return [text for text in renderer({"messages": messages, "tools": tools}) if isinstance(text, Text)]


def trained(text: Text) -> str:
    return "".join(segment.text for segment in text.segments if segment.trained)


def said(number: str, thinks: bool) -> str:
    return f"<think>\nI count {number}.\n</think>\n\nIt is {number}." if thinks else f"It is {number}."


@pytest.mark.parametrize("system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("turns", [1, 2], ids=["one turn", "two turns"])
def test_what_is_said_and_the_end_of_each_turn_are_trained(published, turns: int, system: bool):
    form, tokenizer = published
    messages = [SYSTEM] if system else []
    for number in ("four", "six")[:turns]:
        messages += [{"role": "user", "content": f"Which one? {number}?"}]
        messages += [{"role": "assistant", "content": said(number, form.thinks)}]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            samples(tokenizer, messages)
        return
    if system and SYSTEM["content"] not in expected:
        with pytest.raises(UserError, match="leaves out or changes what message 1 of the system says"):
            samples(tokenizer, messages)
        return
    if form.splits and turns > 1:
        with pytest.raises(UserError, match="rewrites earlier turns"):
            samples(tokenizer, messages)
    found = samples(tokenizer, messages, split_turns=form.splits)
    if not form.splits:
        assert str(found[0]) == expected
        assert trained(found[0]) == "".join(form.begin + messages[i]["content"] + form.end for i in answers)
        return
    for i, text in zip(answers, found, strict=True):
        asked = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        if form.thinks:  # what the model generates behind the prompt that opened <think>
            assert trained(text) == messages[i]["content"].removeprefix("<think>\n") + form.end
            assert str(text) == asked + trained(text)
        else:
            assert trained(text) == form.begin + messages[i]["content"] + form.end
            assert str(text).startswith(asked + trained(text))
            assert str(text) == tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"])
def test_a_call_of_a_tool_is_trained_as_the_template_writes_it(published, arguments: Any):
    form, tokenizer = published
    call = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": "3 degrees"},
        {"role": "assistant", "content": "It is cold."},
    ]
    if not form.call:
        with pytest.raises(UserError, match=form.no_call):
            samples(tokenizer, messages, [WEATHER], split_turns=form.splits)
        return
    found = samples(tokenizer, messages, [WEATHER], split_turns=form.splits)
    assert "".join(map(trained, found)) == f"{form.call}{form.begin}It is cold.{form.end}"
    forms = []
    for given in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        call["function"]["arguments"] = given
        try:
            forms.append(tokenizer.apply_chat_template(messages, tools=[WEATHER], tokenize=False))
        except TypeError:  # a template that joins text to it, or goes through its keys
            continue
    assert str(found[-1]) in forms
