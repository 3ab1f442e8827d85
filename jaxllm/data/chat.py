"""Conversations as a chat template writes them, and which characters of them the model is to say itself."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from jaxllm.core.bounds import Integer
from jaxllm.core.config import Section
from jaxllm.core.errors import UserError
from jaxllm.data.messages import Message, tool_name
from jaxllm.data.segments import Segment, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]

CLOCK = "strftime_now"  # what a template calls for the date
_MARKS_TRAINED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class RenderConfig(Section):
    """What of a record is trained, and how its conversations are written."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """assistant: every answer (assistant turns, completions, outputs); last: the last answer; all: every token"""
    chat_template: str | None = Field(default=None, min_length=1)
    """a file with the chat template of conversations (Jinja); default: the tokenizer's own"""
    template_options: dict[str, str | bool | Integer | float] = Field(default_factory=dict)
    """variables of the chat template, such as {enable_thinking: false}"""
    split_turns: bool = False
    """each assistant turn, with all before it, is a sample of its own: for chat templates that rewrite earlier turns"""


class ChatTemplate:
    """Writes conversations with one chat template, knowing which characters are trained.

    A turn's trained text is what stands inside the template's `{% generation %}` blocks, where it has them. Else it
    is what the conversation up to and with the turn has more than the rendering that asks for the turn. Either way
    both renderings must be how the whole conversation begins, so a template that writes a turn otherwise when more
    follows it is refused, unless every turn is made a sample of its own.

    White space behind the special token that ends a turn is not trained: generation has stopped there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RenderConfig, day: date | None = None) -> None:
        """`day`: what the template is told that the date is; default: today. The hour is midnight.

        Raises UserError when there is no template, and when the tokenizer reads its marks as text."""
        self._tokenizer = tokenizer
        self._config = config
        self._own = None if config.chat_template is None else _read(config.chat_template)
        self._name = f"the chat template {config.chat_template}" if self._own else "the tokenizer's chat template"
        if not self._own and not tokenizer.chat_template:
            raise UserError(
                "conversations need a chat template and the tokenizer has none. Name a file with one by "
                "`chat_template:`, put a chat_template.jinja into the tokenizer's folder, or write the data as prompt "
                "and completion"
            )
        if getattr(tokenizer, "split_special_tokens", False):
            raise UserError(
                "conversations need the marks of the chat template as tokens, and this tokenizer reads them as plain "
                'text; set "split_special_tokens": false in its tokenizer_config.json'
            )
        self._special = special_texts(tokenizer)
        self._day = day or date.today()

    @property
    def text(self) -> str | dict[str, str]:
        """The template itself, or several by name."""
        return self._own or cast("str | dict[str, str]", self._tokenizer.chat_template)

    def samples(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[Text]:
        """The conversation as samples: one, or with `split_turns` one for each trained assistant turn.

        Args:
            messages: see `messages.check_messages`.
            tools: JSON schemas.

        Raises UserError when the template fails, leaves out what a message says, or writes a turn in a way from
        which its trained text cannot be told; each names the message and the remedy.
        """
        conversation = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if messages[i].get("train", True)]
        if self._config.split_turns:
            return [self._sample(conversation[: i + 1], tools, [i]) for i in trained]
        if self._config.train_on == "all":
            kept_out = [i for i, message in enumerate(messages) if not message.get("train", True)]
            return [self._all_but(kept_out, conversation, tools)]
        if self._config.train_on == "last":
            trained = [i for i in trained if i == answers[-1]]
        return [self._sample(conversation, tools, trained)]

    def question(self, messages: Sequence[Message]) -> str:
        """The conversation so far as the model is given it when it is asked for the next answer. Raises UserError."""
        return self._render([*messages], None, add_generation_prompt=True)[0]

    def written(self, messages: Sequence[Message]) -> str:
        """The conversation as a whole. Raises UserError."""
        return self._render([*messages], None)[0]

    def _sample(self, messages: list[Message], tools: list[dict[str, Any]] | None, trained: list[int]) -> Text:
        whole, _ = self._render(messages, tools)
        self._check_written(messages, tools, whole)
        segments: list[Segment] = []
        done = 0
        for i in trained:
            for start, end in self._turn(messages, tools, i, whole):
                segments.append(Segment(whole[done:start], False))
                segments += self._answer(whole[start:end], messages[i].get("content"))
                done = end
        segments.append(Segment(whole[done:], False))
        return _sample_of(segments)

    def _all_but(self, kept_out: list[int], messages: list[Message], tools: list[dict[str, Any]] | None) -> Text:
        whole, _ = self._render(messages, tools)
        self._check_written(messages, tools, whole)
        segments: list[Segment] = []
        done = 0
        for i in kept_out:
            if messages[i]["role"] != "assistant":
                raise UserError(
                    f"message {i + 1} is the {messages[i]['role']}'s and marked `train: false`, which with `train_on: "
                    "all` only assistant messages can be"
                )
            for start, end in self._turn(messages, tools, i, whole):
                segments += [Segment(whole[done:start], True), Segment(whole[start:end], False)]
                done = end
        return _sample_of([*segments, *self._answer(whole[done:], None)])

    def _turn(self, messages: list[Message], tools: list[dict[str, Any]] | None, i: int, whole: str) -> Spans:
        """Which characters of `whole`, the rendering of all `messages`, message `i` of the assistant is to say."""
        if i == 0:
            raise UserError("the first message is the assistant's; a conversation begins with a system or user message")
        closed, spans = self._render(messages[: i + 1], tools)
        if not whole.startswith(closed):
            before, after = _difference(closed, whole)
            raise UserError(
                f"{self._name} rewrites earlier turns: with message {i + 1} as the last one it writes {before!r} where "
                f"it writes {after!r} when more follows, so the model would be trained on what it never says. Set "
                "`split_turns: true` to train each turn as the end of a conversation, or `train_on: last`, or give a "
                "template that only appends by `chat_template:`"
            )
        marked = self._marks_trained(tools)
        before, _ = self._render(messages[:i], tools)
        opened = before if marked else self._render(messages[:i], tools, add_generation_prompt=True)[0]
        if not closed.startswith(opened):
            asked, written = _difference(opened, closed)
            raise UserError(
                f"{self._name} writes {asked!r} when it asks for an answer and {written!r} for the finished one "
                f"(message {i + 1}), so what the model is to say cannot be told. Give a template by `chat_template:` "
                "that writes both alike or has the trained text in {% generation %} blocks, or options by "
                "`template_options:`"
            )
        own = [span for span in spans if span[1] > len(opened)] if marked else [(len(opened), len(closed))]
        # Where the prompt itself opens the reasoning, the turn holds its mark and the trained text does not.
        self._check_answer(messages[i], i, "".join(closed[a:b] for a, b in own) if marked else closed[len(before) :])
        if opened == before and not marked:
            self._check_opened(messages[i], closed[len(opened) :])
        return own

    def _answer(self, text: str, content: str | None) -> list[Segment]:
        """A trained text of the assistant, with the mark that ends its turn told apart."""
        body = text.rstrip()
        if mark := special_end(body, self._special):
            return [
                Segment(body[: len(body) - len(mark)], True),
                Segment(mark, True, ends=True),
                Segment(text[len(body) :], False),
            ]
        said = (content or "").strip()
        end = body.rfind(said) + len(said) if said and said in body else len(body)
        return [Segment(text[:end], True), Segment(text[end:], True, ends=bool(body[end:].strip()))]

    def _check_answer(self, message: Message, i: int, turn: str) -> None:
        """Raises UserError unless the text of a turn holds what the message says."""
        if not turn:
            raise UserError(
                f"the {{% generation %}} blocks of {self._name} leave out message {i + 1}, so it would not be trained; "
                "put all that the assistant writes into such a block, or mark the message `train: false`"
            )
        written = _squeezed(turn)
        names = [tool_name(call) for call in message.get("tool_calls", ())]
        for said in (message.get("content"), message.get("reasoning_content"), *names):
            if isinstance(said, str) and not _holds(written, said):
                raise UserError(
                    f"{self._name} leaves out or changes what the assistant says in message {i + 1} ({said!r:.60}), so "
                    "it would not be trained; give a template that writes it by `chat_template:`"
                )

    def _check_opened(self, message: Message, turn: str) -> None:
        said = message.get("content", "").strip()
        header = turn[: turn.find(said)].strip() if said in turn and not message.get("tool_calls") else ""
        if header:
            raise UserError(
                f"{self._name} does not open the assistant's turn when asked (add_generation_prompt), so {header!r}, "
                "which the model is given, would be trained; add `{% if add_generation_prompt %}` with that text to it"
            )

    def _check_written(self, messages: list[Message], tools: list[dict[str, Any]] | None, whole: str) -> None:
        """Raises UserError when the model would not read a message or a tool. Assistant turns are checked apart."""
        written = _squeezed(whole)
        for i, message in enumerate(messages, 1):
            if message["role"] != "assistant" and not _holds(written, message.get("content", "")):
                raise UserError(
                    f"{self._name} leaves out or changes what message {i} of the {message['role']} says; give a "
                    "template that writes it by `chat_template:`, or leave the message out"
                )
        for tool in tools or ():
            if (name := tool_name(tool)) and not _holds(written, name):
                raise UserError(
                    f"{self._name} does not write the tool {name!r} of the column 'tools'; give a template that does "
                    "by `chat_template:`, or leave the column out"
                )

    def _marks_trained(self, tools: list[dict[str, Any]] | None) -> bool:
        return _MARKS_TRAINED.search(self._template(tools)) is not None

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        return self._own or self._tokenizer.get_chat_template(None, tools)

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, add_generation_prompt: bool = False
    ) -> tuple[str, Spans]:
        """The conversation as text, as `apply_chat_template` gives it, and the spans of `{% generation %}` blocks."""
        from transformers.utils import chat_template_utils

        templates: Any = chat_template_utils
        try:
            template = self._template(tools)
            templates._compile_jinja_template(template).environment.globals[CLOCK] = self._day.strftime
            rendered: Any = templates.render_jinja_template(
                conversations=[messages],
                tools=cast(Any, tools),
                chat_template=template,
                return_assistant_tokens_mask=_MARKS_TRAINED.search(template) is not None,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokenizer.special_tokens_map, **self._config.template_options},
            )
        except Exception as error:  # a template can raise whatever Python can
            line = _template_line(error)
            where = f" at line {line}" if line else ""
            raise UserError(f"{self._name} cannot write this conversation{where}: {error}") from error
        (text,), spans = rendered
        return text, spans[0] if spans else []


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The spellings of the tokenizer's special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(sorted({token.content for token in added if token.special}, key=len, reverse=True))


def special_end(text: str, special: Sequence[str]) -> str:
    """The special token with which `text` ends; empty if there is none."""
    return next((token for token in special if text.endswith(token)), "")


def _sample_of(segments: list[Segment]) -> Text:
    return Text(tuple(segment for segment in segments if segment.text), document=False, exact=True)


def _read(file: str) -> str:
    try:
        with open(os.path.expanduser(file), encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"the file chat_template: {file} cannot be read: {reason}") from error
    if not text.strip():
        raise UserError(f"the file chat_template: {file} is empty")
    return text


def _template_line(error: Exception) -> int | None:
    """The line of the template at which `error` came up."""
    if (line := getattr(error, "lineno", None)) is not None:
        return line
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)


def _difference(one: str, other: str, before: int = 12, width: int = 40) -> tuple[str, str]:
    """What two texts have around the place where they part."""
    alike = (a == b for a, b in zip(one, other, strict=False))
    place = next((i for i, same in enumerate(alike) if not same), min(len(one), len(other)))
    around = slice(max(0, place - before), place + width)
    return one[around], other[around]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds(written: str, said: str) -> bool:
    """Whether a squeezed text has `said`, as it is or as templates write the results of tools: in JSON."""
    return _squeezed(said) in written or _squeezed(json.dumps(said, ensure_ascii=False)[1:-1]) in written
