"""A conversation: what the model sees, where a reply ends, and what cannot be talked with."""

import pytest
from transformers import AutoTokenizer

from jaxllm.core.errors import UserError
from jaxllm.generate.chat import Conversation

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n###\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tokenizers/qwen2.5")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_model_sees_the_conversation_as_the_template_writes_it(tokenizer):
    conversation = Conversation(tokenizer, "Be kind.")
    conversation.ask("Hi!")
    conversation.answered("Hello.")
    text = tokenizer.decode(conversation.ask("And?"))
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_reply_ends_where_the_template_ends_it(tokenizer):
    """A model trained on conversations often names only another end of text in its files."""
    assert Conversation(tokenizer).stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert Conversation(tokenizer).stop == []
    tokenizer.chat_template = PLAIN
    conversation = Conversation(tokenizer)
    assert (conversation.stop_ids, conversation.stop) == ([], ["###"])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    conversation = Conversation(tokenizer)
    assert (conversation.stop_ids, conversation.stop) == ([], [])


def test_the_marks_are_one_token_each_and_no_beginning_is_added_twice(shared, tokenizer):
    ids = Conversation(tokenizer).ask("Hi!")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    llama = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    llama.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    conversation = Conversation(llama)
    assert conversation.ask("Hi!").count(llama.bos_token_id) == 1
    assert conversation.stop_ids == [llama.eos_token_id]


def test_what_cannot_be_talked_with(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(UserError, match=r"cannot write this conversation.*: no system message, please"):
        Conversation(tokenizer, "Be kind.")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="conversations need a chat template"):
        Conversation(tokenizer)
    tokenizer.chat_template, tokenizer.split_special_tokens = CHATML, True
    with pytest.raises(UserError, match='"split_special_tokens": false'):
        Conversation(tokenizer)
