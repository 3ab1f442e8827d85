"""From a record to segments of text, each trained or not: one `Format` a layout of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.core.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"

Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text whose tokens are all trained, or all only read."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Format:
    """How records with certain `columns` become text.

    `render(columns, tokenizer)` gives the segments, whose texts follow each other directly.
    `document`: the tokenizer's own special tokens go in front and a trained EOS behind; otherwise the
    rendered text holds its special tokens already.
    `splittable`: a sample longer than the window is trained in consecutive pieces; otherwise it is cut.
    """

    columns: tuple[str, ...]
    render: Callable[[Columns, PreTrainedTokenizerBase], list[Segment]]
    document: bool = True
    splittable: bool = False


FORMATS: Registry[Format] = Registry("data format")


def detect(columns: Iterable[str]) -> str:
    """The name of the one format whose columns are all among `columns`.

    Raises UserError when no format fits, or more than one.
    """
    found = list(columns)
    fitting = [name for name in FORMATS if set(FORMATS[name].columns) <= set(found)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"the columns {', '.join(found)} fit more than one format ({', '.join(fitting)}); choose one by `format:`"
        )
    needs = "; ".join(f"{name}: {', '.join(FORMATS[name].columns)}" for name in FORMATS)
    hints = "".join(did_you_mean(column, _all_columns()) for column in found[:8])
    raise UserError(
        f"the columns {', '.join(found)} fit no format.{hints} Rename them by `fields: {{ours: theirs}}`. "
        f"Formats and their columns: {needs}."
    )


def render(name: str, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The segments of a record in the format called `name`.

    Raises UserError when a column is missing or unfit, and when the text cannot be written as UTF-8.
    """
    format = FORMATS[name]
    missing = [column for column in format.columns if column not in columns]
    if missing:
        raise UserError(
            f"format {name!r} needs the column {missing[0]!r}.{did_you_mean(missing[0], columns)} "
            f"Found: {', '.join(columns) or 'none'}. Rename columns by `fields: {{{missing[0]}: theirs}}`."
        )
    segments = format.render(columns, tokenizer)
    try:
        "".join(segment.text for segment in segments).encode()
    except UnicodeEncodeError as error:
        broken = ascii(error.object[error.start])
        raise UserError(f"the text holds {broken}, half of a surrogate pair, which is no character") from None
    return segments


def _all_columns() -> list[str]:
    return [column for name in FORMATS for column in FORMATS[name].columns]


def _string(columns: Columns, name: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise UserError(f"column {name!r} must be a string, not {value!r:.60}")
    return value


def _text(columns: Columns, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    return [Segment(_string(columns, "text"), True)]


def _prompt_completion(columns: Columns, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    return [Segment(_string(columns, "prompt"), False), Segment(_string(columns, "completion"), True)]


def _instruction(columns: Columns, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    given = _string(columns, "input") if columns.get("input") else ""
    middle = f"### Input:\n{given}\n\n" if given else ""
    prompt = f"### Instruction:\n{_string(columns, 'instruction')}\n\n{middle}### Response:\n"
    return [Segment(prompt, False), Segment(_string(columns, "output"), True)]


def _messages(columns: Columns, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The conversation as the tokenizer's chat template writes it; what the assistant says is trained.

    A turn is what the whole text has between the rendering that asks for the turn and the one that ends with
    it, so the mark that ends the turn is learned and the one that opens it is not.
    """
    messages = _checked_messages(columns["messages"])
    if not tokenizer.chat_template:
        raise UserError(
            "format 'messages' needs a chat template and the tokenizer has none. Put a chat_template.jinja "
            "into the tokenizer's folder, or write the data as prompt and completion"
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise UserError(
            "format 'messages' needs the marks of the chat template as tokens, and this tokenizer reads them as plain "
            'text; set "split_special_tokens": false in its tokenizer_config.json'
        )
    whole = _chat(messages, tokenizer)
    segments: list[Segment] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _chat(messages[:i], tokenizer, add_generation_prompt=True)
        closed = _chat(messages[: i + 1], tokenizer)
        if not (whole.startswith(closed) and closed.startswith(opened)):
            raise UserError(
                f"the chat template rewrites earlier turns (message {i + 1} is not where its turn began), so "
                "the trained tokens cannot be told. Use a template that only appends, or write the data as "
                "prompt and completion"
            )
        segments += [
            Segment(whole[done : len(opened)], False),
            Segment(whole[len(opened) : len(closed)], True),
        ]
        done = len(closed)
    return [*segments, Segment(whole[done:], False)]


def _chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template cannot render these messages: {error}") from error
    return str(text)


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"column 'messages' must be a list of messages with at least one, not {messages!r:.60}")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {i} must be an object with a `role` and a `content`, not {message!r:.60}")
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            raise UserError(f"message {i}: `content` must be a string, not {message.get('content')!r:.60}")
    if messages[0]["role"] == "assistant":
        raise UserError("the first message is the assistant's; a conversation begins with a system or user message")
    return messages


FORMATS.add("text", Format(("text",), _text, splittable=True))
FORMATS.add("prompt_completion", Format(("prompt", "completion"), _prompt_completion))
FORMATS.add("instruction", Format(("instruction", "output"), _instruction))
FORMATS.add("messages", Format(("messages",), _messages, document=False))
