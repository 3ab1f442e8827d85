"""What token stores were called by the versions that wrote no day into a checkpoint, whose runs still go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from jaxllm.data.records.source import SourceConfig, find_files
from jaxllm.data.rows.store import renderer_of
from jaxllm.data.text import tokenize
from jaxllm.files.compressed import Suffix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 3
# In this order, and with the values of their day: a later option is not among them.
_OPTIONS = ("train_on", "chat_template", "template_options", "split_turns", "format", "fields", "columns", "separator")
_PLACES = ("split", "subset", "path")


def old_key(sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast, day: date) -> str:
    """The old key of the store of `sources`, for which every byte of every file is read, as it was at every start."""
    facts = [renderer_of(config, tokenizer, day)[1] for config in sources]
    digest = hashlib.blake2b(digest_size=16)
    for config in sources:
        digest.update(config.model_dump_json(include={*_OPTIONS, *_PLACES}).encode())
        for file in find_files(config):
            digest.update(json.dumps(file).encode())
            kind = Suffix.of(file).kind
            if kind in ("csv", "tsv") and not (kind == "csv" if config.quotes is None else config.quotes):
                digest.update(b"quotes are text")  # then they had a meaning in both
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    key = [_VERSION, digest.hexdigest(), tokenize.fingerprint(tokenizer), facts]
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
