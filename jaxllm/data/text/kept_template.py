"""The chat template that a run keeps, so that its model is asked as it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxllm.data.text.chat import ChatTemplate, RenderConfig
from jaxllm.data.text.formats import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def kept_template(
    sources: Sequence[RenderConfig], formats: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str | None, str | None]:
    """The template that wrote all conversations, if it is not the tokenizer's own; and a remark for the log.

    formats: the names of the sources' formats. The values of `template_options` become the template's defaults, so
    that whoever loads the tokenizer renders as the training did. None and a remark: the sources are written in several
    ways.
    """
    names = formats if len(formats) == len(sources) else ["messages"] * len(sources)  # of sources with one label
    ways = [config for config, name in zip(sources, names, strict=True) if _writes(config, name, tokenizer)]
    if len({(config.chat_template, json.dumps(config.template_options, sort_keys=True)) for config in ways}) > 1:
        return None, (
            "the sources write conversations by several chat templates or template_options; the run and its export "
            "keep the tokenizer's own template, by which `generate --chat` asks"
        )
    if not ways or not (ways[0].chat_template or ways[0].template_options):
        return None, None
    template = ChatTemplate(tokenizer, ways[0]).text
    if not isinstance(template, str):  # several by name, of which the first is for conversations without tools
        template = template.get("default") or next(iter(template.values()))
    return with_defaults(template, ways[0].template_options, tokenizer.special_tokens_map), None


def _writes(config: RenderConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template writes the records of a source. Records of some formats may be texts, which need none."""
    return FORMATS[name].chat and bool(config.chat_template or tokenizer.chat_template)


def with_defaults(template: str, options: Mapping[str, str | bool | int | float], given: Mapping[str, object]) -> str:
    """`template` with `options` as the values of variables that it is not given.

    given: the names that every renderer passes, the special tokens; for these the option holds all the same.
    """
    lines: list[str] = []
    for name, value in options.items():
        assignment = f"{{%- set {name} = {_literal(value)} %}}"
        condition = f"{{%- if {name} is not defined %}}"
        lines.append(assignment if name in given else f"{condition}{assignment}{{%- endif %}}")
    return "".join(f"{line}\n" for line in lines) + template


def _literal(value: str | bool | int | float) -> str:
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)
