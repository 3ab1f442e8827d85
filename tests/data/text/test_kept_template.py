"""The template that a run keeps asks as the training rendered, for whoever loads the tokenizer."""

import pytest
from transformers import AutoTokenizer

from jaxllm.data.text.chat import ChatTemplate, RenderConfig
from jaxllm.data.text.kept_template import kept_template, with_defaults
from jaxllm.generate.chat import Conversation

MESSAGES = [{"role": "user", "content": "Hi!"}]
# The options are read at the top, in a loop and in a macro.
TEMPLATE = """
{%- macro tag(text) %}{{ '<' + (style | default('plain')) + '>' + text }}{% endmacro -%}
{{ bos_token }}{% if thinks is defined and not thinks %}[no thoughts]{% endif %}
   {% for m in messages %}{{ tag(m.role) }}: {{ m.content }}{% if depth is defined %}({{ depth + 1 }}){% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
OPTIONS = [
    {},
    {"thinks": False},
    {"thinks": True, "style": 'a "b" \\ \n{{ c }} ü', "depth": -3},
    {"depth": 1e-07, "bos_token": "[BOS]"},
]


@pytest.fixture
def tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["tokenizer's", "the source's"])
def test_the_kept_template_writes_what_was_trained(options, own, tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("assistant: ", "answer: "))
    config = RenderConfig(template_options=options, chat_template=str(tmp_path / "own.jinja") if own else None)
    asked = ChatTemplate(tokenizer, config).question(MESSAGES)
    kept, remark = kept_template([config], ["messages"], tokenizer)
    assert remark is None
    assert (kept is None) == (not own and not options)
    if kept is not None:
        tokenizer.chat_template = kept
    tokenizer.save_pretrained(tmp_path / "run")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert loaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == asked
    ids = loaded(asked, add_special_tokens=False)["input_ids"]
    assert Conversation(loaded).ask("Hi!") == ids


def test_who_asks_may_still_choose(tokenizer):
    tokenizer.chat_template = with_defaults(TEMPLATE, {"thinks": False}, tokenizer.special_tokens_map)
    assert "no thoughts" in tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "no thoughts" not in tokenizer.apply_chat_template(MESSAGES, tokenize=False, thinks=True)


def test_white_space_at_the_start_of_a_template_stays(tokenizer):
    for start in ("\n", "  ", "  {% if true %}x{% endif %}", "\n\n{%- if true %}"):
        template = start + ("{% endif %}" if start.endswith("{%- if true %}") else "") + TEMPLATE
        texts = []
        for each in (template, with_defaults(template, {"thinks": True, "bos_token": "<s>"}, {"bos_token": "<s>"})):
            tokenizer.chat_template = each
            texts.append(tokenizer.apply_chat_template(MESSAGES, tokenize=False))
        assert texts[0] == texts[1]


def test_sources_that_are_written_alike_or_not(tokenizer, tmp_path):
    own, options = RenderConfig(), RenderConfig(template_options={"thinks": False})
    kept, _ = kept_template([own, options], ["text", "messages"], tokenizer)  # text has no template
    assert kept is not None
    assert kept.endswith(TEMPLATE)
    kept, _ = kept_template([options, options], ["messages", "conversations"], tokenizer)
    assert kept is not None
    kept, remark = kept_template([own, options], ["messages", "messages"], tokenizer)
    assert kept is None
    assert "by several chat templates or template_options" in remark
    tokenizer.chat_template = None
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    file = RenderConfig(chat_template=str(tmp_path / "own.jinja"))
    # Prompts and completions that are texts: there is no template that could write them.
    assert kept_template([own, file], ["prompt_completion", "messages"], tokenizer) == (TEMPLATE, None)
    assert kept_template([own], ["prompt_completion"], tokenizer) == (None, None)
