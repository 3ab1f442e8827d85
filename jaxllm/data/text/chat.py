"""Conversations as a chat template writes them, and which characters of them the model is to say itself."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, cast

from pydantic import Field

from jaxllm.core.config import OnResume, Section
from jaxllm.core.config.bounds import Integer
from jaxllm.core.errors import UserError
from jaxllm.data.text.chat_rendering import Conversation, Failure, Rendering, render
from jaxllm.data.text.chat_rendering_process import MARKS
from jaxllm.data.text.messages import (
    ARGUMENT_FORMS,
    PROBED,
    Message,
    form_of_arguments,
    tool_arguments,
    tool_name,
)
from jaxllm.data.text.segments import Segment, Text
from jaxllm.data.text.turn_finder import Turn, TurnFinder, View, holds, squeezed
from jaxllm.data.text.turns import OPENINGS, PROBE, Marks, Openings, followers, openings, without_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Tools = list[dict[str, Any]] | None
# What is computed from renderings, which it asks for as it goes; many of them are asked for together.
Steps = Generator[list[Conversation], list[Rendering | Failure], T]

CLOCK = "strftime_now"  # what a template calls for the date


class RenderConfig(Section):
    """What of a record is trained, and how its conversations are written."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """assistant: every answer (assistant turns, completions, outputs); last: the last answer; all: every token"""
    chat_template: Annotated[str | None, OnResume.NOTED] = Field(default=None, min_length=1)  # its text is compared
    """a file with the chat template of conversations (Jinja); default: the tokenizer's own"""
    template_options: dict[str, str | bool | Integer | float] = Field(default_factory=dict)
    """variables of the chat template, such as {enable_thinking: false}"""
    split_turns: bool = False
    """each assistant turn, with all before it, is a sample of its own: for chat templates that rewrite earlier turns"""


class Dialogue(NamedTuple):
    """A conversation that is yet to be written: messages as `messages.check_messages` gives them, and JSON schemas."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None


class ChatTemplate:
    """Writes conversations with one chat template, knowing which characters are trained.

    A template with `{% generation %}` blocks says itself what is trained. With another one it is what the conversation
    up to and with a turn has more than the rendering that asks for the turn, up to the end of the turn. The end is
    what the template writes behind the answer whether or not another turn follows; a prompt for the next answer, or a
    mark that only closes the conversation, is not trained. A template that writes a turn otherwise when more follows
    it is refused, unless every turn is made a sample of its own.

    Where the prompt opens the reasoning of the answer, and the template leaves the reasoning out of what it writes,
    the sample is the prompt and what the model generates behind it.

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
        added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
        bos, eos = (text if isinstance(text, str) else None for text in (tokenizer.bos_token, tokenizer.eos_token))
        self._marks = Marks(special_texts(tokenizer), added, bos, eos)
        self._finder = TurnFinder(self._name, self._marks)
        self._openings: dict[str, Openings] = {}
        self._arguments: dict[str, str] = {}
        self._day = day or date.today()

    @property
    def text(self) -> str | dict[str, str]:
        """The template itself, or several by name."""
        return self._own or cast("str | dict[str, str]", self._tokenizer.chat_template)

    def samples(self, dialogues: Sequence[Dialogue]) -> list[list[Text] | UserError]:
        """Each conversation as samples: one, or with `split_turns` one for each trained assistant turn.

        An error is raised for nobody, but given in the place of the samples: when the template fails or exceeds its
        limits, leaves out what a message says, or writes a turn in a way from which its trained text cannot be told;
        each names the message and the remedy.
        """
        found: list[list[Text] | UserError] = [[] for _ in dialogues]
        steps = {i: self._of(dialogue) for i, dialogue in enumerate(dialogues)}
        answers: dict[int, list[Rendering | Failure] | None] = dict.fromkeys(steps)
        while answers:
            wanted: dict[int, list[Conversation]] = {}
            for i, answer in answers.items():
                try:
                    self._refuse_excess(answer or [])
                    wanted[i] = next(steps[i]) if answer is None else steps[i].send(answer)
                except StopIteration as end:
                    found[i] = end.value
                except UserError as error:
                    found[i] = error
            answers = self._rendered(wanted)
        return found

    def _refuse_excess(self, answers: Sequence[Rendering | Failure]) -> None:
        """Raises UserError where a rendering exceeded a limit, were it only one by which the template is told."""
        for found in answers:
            if isinstance(found, Failure) and found.exceeds:
                self._text(found)

    def _rendered(self, wanted: dict[int, list[Conversation]]) -> dict[int, list[Rendering | Failure] | None]:
        """What the templates write for the conversations that each dialogue wants, all of one template in one call."""
        places: dict[str, list[tuple[int, int]]] = {}
        for i, conversations in wanted.items():
            for n, conversation in enumerate(conversations):
                places.setdefault(self._template(conversation.tools), []).append((i, n))
        answers: dict[int, Any] = {i: [None] * len(conversations) for i, conversations in wanted.items()}
        variables = {**self._tokenizer.special_tokens_map, **self._config.template_options}
        for template, asked in places.items():
            together = [wanted[i][n] for i, n in asked]
            written = render(template, together, variables=variables, now=self._day.isoformat())
            for (i, n), answer in zip(asked, written, strict=True):
                answers[i][n] = answer
        return answers

    def _of(self, dialogue: Dialogue) -> Steps[list[Text]]:
        messages, tools = dialogue
        conversation = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if messages[i].get("train", True)]
        conversation = yield from self._with_arguments(conversation, tools)
        if self._config.split_turns:
            samples: list[Text] = []
            for i in trained:
                samples.append((yield from self._sample(conversation[: i + 1], tools, [i])))
            return samples
        if self._config.train_on == "all":
            kept_out = [i for i, message in enumerate(messages) if not message.get("train", True)]
            return [(yield from self._all_but(kept_out, conversation, tools))]
        if self._config.train_on == "last":
            trained = [i for i in trained if i == answers[-1]]
        return [(yield from self._sample(conversation, tools, trained))]

    def question(self, messages: Sequence[Message]) -> str:
        """The conversation so far as the model is given it when it is asked for the next answer. Raises UserError."""
        return self._alone(Conversation(messages, ask=True))

    def written(self, messages: Sequence[Message]) -> str:
        """The conversation as a whole. Raises UserError."""
        return self._alone(Conversation(messages))

    def _alone(self, conversation: Conversation) -> str:
        (found,) = self._rendered({0: [conversation]})[0] or []
        return self._text(found)

    def _sample(self, messages: list[Message], tools: Tools, trained: list[int]) -> Steps[Text]:
        whole, turns = yield from self._turns(messages, tools, trained)
        segments: list[Segment] = []
        done = 0
        for i, turn in zip(trained, turns, strict=True):
            whole = turn.text or whole
            for start, end in turn.spans:
                segments.append(Segment(whole[done:start], False))
                segments += self._answer(whole[start:end], messages[i].get("content"))
                done = end
        segments.append(Segment(whole[done:], False))
        return _sample_of(segments)

    def _all_but(self, kept_out: list[int], messages: list[Message], tools: Tools) -> Steps[Text]:
        for i in kept_out:
            if messages[i]["role"] != "assistant":
                raise UserError(
                    f"message {i + 1} is the {messages[i]['role']}'s and marked `train: false`, which with `train_on: "
                    "all` only assistant messages can be"
                )
        whole, turns = yield from self._turns(messages, tools, kept_out)
        segments: list[Segment] = []
        done = 0
        for turn in turns:
            whole = turn.text or whole
            for start, end in turn.spans:
                segments += [Segment(whole[done:start], True), Segment(whole[start:end], False)]
                done = end
        return _sample_of([*segments, *self._answer(whole[done:], None)])

    def _turns(self, messages: list[Message], tools: Tools, chosen: list[int]) -> Steps[tuple[str, list[Turn]]]:
        """The conversation as text, and where it has the `chosen` messages, which are the assistant's."""
        if chosen and chosen[0] == 0:
            raise UserError("the first message is the assistant's; a conversation begins with a system or user message")
        if MARKS.search(self._template(tools)):
            return (yield from self._marked_turns(messages, tools, chosen))
        opens = yield from self._how_turns_open(tools)
        wanted = [Conversation(messages, tools)]
        for i in chosen:
            wanted += [Conversation(messages[:i], tools, ask=True), Conversation(messages[: i + 1], tools)]
        behind = followers(messages[-1]) if chosen and chosen[-1] == len(messages) - 1 else []
        wanted += [Conversation([*messages, message], tools) for message in behind]
        written = yield wanted
        whole = self._text(written[0])
        self._check_written(messages, tools, whole)
        followed = [found.text for found in written[1 + 2 * len(chosen) :] if isinstance(found, Rendering)]
        followed = [text for text in followed if PROBE in text]
        turns: list[Turn] = []
        for n, i in enumerate(chosen):
            opened, closed = (self._text(found) for found in written[1 + 2 * n : 3 + 2 * n])
            last = i == len(messages) - 1
            view = View(messages, i, opened, closed, whole, followed[0] if last and followed else None, opens)
            turns.append(self._finder.turn(view))
            if not turns[-1].text:
                yield from self._check_opened(view, tools)
        return whole, turns

    def _marked_turns(self, messages: list[Message], tools: Tools, chosen: list[int]) -> Steps[tuple[str, list[Turn]]]:
        """As `_turns`, for a template that marks what is trained: it is trusted, and may rewrite what it wrote."""
        (found,) = yield [Conversation(messages, tools)]
        whole, spans = self._text(found), found.spans if isinstance(found, Rendering) else []
        self._check_written(messages, tools, whole)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ends = [*range(1, len(answers) + 1)]
        if len(spans) != len(answers):
            # A message may have no block, or several: each adds as many as the conversation up to it has more.
            written = yield [Conversation(messages[: i + 1], tools) for i in answers]
            ends = [len(found.spans) if isinstance(found, Rendering) else -1 for found in written]
        begins = dict(zip(answers, [0, *ends], strict=False))
        turns: list[Turn] = []
        for i, end in zip(answers, ends, strict=True):
            if i not in chosen:
                continue
            own = [span for span in spans[begins[i] : end] if span[1] > span[0]]
            said = "".join(whole[a:b] for a, b in own)
            if not said or ends[-1] != len(spans) or begins[i] > end:
                raise UserError(
                    f"the {{% generation %}} blocks of {self._name} leave out message {i + 1}, so it would not be "
                    "trained; put all that the assistant writes into such a block, or mark the message `train: false`"
                )
            shown = messages[i]
            if i < len(messages) - 1:  # templates leave the reasoning of earlier turns out
                shown = {key: value for key, value in shown.items() if key != "reasoning_content"}
                shown["content"] = without_reasoning(shown.get("content", ""))
            self._finder.check_answer(shown, i, said, "")
            turns.append(Turn(own))
        return whole, turns

    def _how_turns_open(self, tools: Tools) -> Steps[Openings]:
        template = self._template(tools)
        if template not in self._openings:
            written = yield [Conversation(messages, tools) for messages in OPENINGS]
            first, second = (found.text if isinstance(found, Rendering) else None for found in written)
            self._openings[template] = openings(first, second, self._marks)
        return self._openings[template]

    def _with_arguments(self, messages: list[Message], tools: Tools) -> Steps[list[Message]]:
        """The messages with the arguments of tool calls as the template asks for them: as JSON text, or as objects."""
        first = next((i for i, message in enumerate(messages) if "tool_calls" in message), None)
        if first is None:
            return messages
        template = self._template(tools)
        if template not in self._arguments:
            tried = [[*messages[:first], tool_arguments(messages[first], form, PROBED)] for form in ARGUMENT_FORMS]
            written = yield [Conversation(tried_messages, tools) for tried_messages in tried]
            texts = [found.text if isinstance(found, Rendering) else "" for found in written]
            self._arguments[template] = form_of_arguments(*texts)
        return [tool_arguments(message, self._arguments[template]) for message in messages]

    def _answer(self, text: str, content: str | None) -> list[Segment]:
        """A trained text of the assistant, with the mark that ends its turn told apart."""
        body = text.rstrip()
        if mark := special_end(body, self._marks.special):
            return [
                Segment(body[: len(body) - len(mark)], True),
                Segment(mark, True, ends=True),
                Segment(text[len(body) :], False),
            ]
        said = (content or "").strip()
        end = body.rfind(said) + len(said) if said and said in body else len(body)
        return [Segment(text[:end], True), Segment(text[end:], True, ends=bool(body[end:].strip()))]

    def _check_opened(self, view: View, tools: Tools) -> Steps[None]:
        """Raises UserError where the template, asked for an answer, leaves the opening of its turn to the model."""
        turn, said = view.closed[len(view.opened) :], view.message.get("content", "").strip()
        header = turn[: turn.find(said)].strip() if said in turn and not view.message.get("tool_calls") else ""
        if not header:
            return
        before = view.messages[: view.i]
        unasked, other = yield [Conversation([*before, *more], tools) for more in ([], followers(view.message)[-1:])]
        # Some templates open the assistant's turn unasked: where another's follows, they write something else there.
        unopened = isinstance(other, Failure) or other.text.startswith(view.opened)
        if unopened and self._text(unasked) == view.opened:
            raise UserError(
                f"{self._name} does not open the assistant's turn when asked (add_generation_prompt), so {header!r}, "
                "which the model is given, would be trained; add `{% if add_generation_prompt %}` with that text to it"
            )

    def _check_written(self, messages: list[Message], tools: Tools, whole: str) -> None:
        """Raises UserError when the model would not read a message or a tool. Assistant turns are checked apart."""
        written = squeezed(whole)
        for i, message in enumerate(messages, 1):
            if message["role"] != "assistant" and not holds(written, message.get("content", "")):
                raise UserError(
                    f"{self._name} leaves out or changes what message {i} of the {message['role']} says; give a "
                    "template that writes it by `chat_template:`, or leave the message out"
                )
        for tool in tools or ():
            if (name := tool_name(tool)) and not holds(written, name):
                raise UserError(
                    f"{self._name} does not write the tool {name!r} of the column 'tools'; give a template that does "
                    "by `chat_template:`, or leave the column out"
                )

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self._own or self._tokenizer.get_chat_template(None, cast(Any, tools))

    def _text(self, found: Rendering | Failure) -> str:
        if isinstance(found, Failure):
            raise UserError(f"{self._name} cannot write this conversation{found}")
        return found.text


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
