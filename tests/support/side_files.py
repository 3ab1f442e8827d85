"""Small files of the kinds that lie beside a model's weights, each whole."""

import json
from functools import cache

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

SIDE_FILES = {
    "generation_config.json": b'{"do_sample": true}',
    "tokenizer_config.json": b'{"bos_token": "<s>"}',
    "special_tokens_map.json": b'{"bos_token": "<s>"}',
    "added_tokens.json": b'{"<s>": 1}',
    "chat_template.jinja": b"{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "vocab.json": b'{"a": 0, "b": 1, "ab": 2}',
    "vocab.txt": b"a\nb\n",
    "merges.txt": b"#version: 0.2\na b\n",
    # Tokens and their ranks, as tiktoken has them.
    "tokenizer.model": b"YQ== 0\nYg== 1\n",
}


@cache
def tokenizer_json() -> bytes:
    content = json.loads(Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).to_str())
    return json.dumps(content).encode()


def side_files() -> dict[str, bytes]:
    """By its name, one file of each kind."""
    return {**SIDE_FILES, "tokenizer.json": tokenizer_json()}
