"""From a record to samples of text or tokens, each part trained or not: one `Format` a layout of columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.core.registry import Registry
from jaxllm.data.text.chat import CLOCK, ChatTemplate, Dialogue, RenderConfig, special_end, special_texts
from jaxllm.data.text.messages import Message, check_messages, check_tools, from_sharegpt
from jaxllm.data.text.segments import Rendered, Segment, Text, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
UNTRAINED = -100  # the label of a token that is not trained, as everywhere in PyTorch

# What other trainers call our formats.
FOREIGN_FORMATS = {
    "alpaca": "instruction",
    "chat": "messages",
    "chat_template": "messages",
    "chatml": "messages",
    "input_ids": "tokens",
    "sharegpt": "conversations",
    "tokenized": "tokens",
}

# Columns that rate an answer (KTO's, and LLaMA-Factory's name for it), and the words for good and bad.
RATING_COLUMNS = ("label", "kto_tag")
_RATINGS = {
    *("true", "t", "yes", "y", "+", "chosen", "accept", "accepted", "desirable", "good", "positive", "correct"),
    *("right", "up", "thumbs_up", "like", "upvote", "win"),
    *("false", "f", "no", "n", "-", "rejected", "reject", "undesirable", "bad", "negative", "incorrect", "wrong"),
    *("down", "thumbs_down", "dislike", "downvote", "lose"),
}

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How records with certain columns become samples.

    `columns`: those that a record must have; `optional`: those that it may have besides; any other is not read.
    `without`: a record that has one of these is of another format.
    `chat`: it has conversations, so the options of chat templates apply.
    `own_mask`: the records themselves say what is trained, so `train_on` does not apply.
    `stop`: what to do that the end of a turn is trained, where the format itself does not see to it.
    """

    columns: tuple[str, ...]
    render: Callable[[Columns, Renderer], list[Rendered] | Dialogue]
    optional: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    chat: bool = False
    own_mask: bool = False
    stop: str = ""

    def __str__(self) -> str:
        optional = f" (also {', '.join(self.optional)})" if self.optional else ""
        return ", ".join(self.columns) + optional

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return (*self.columns, *self.optional)

    def fits(self, columns: Columns) -> bool:
        return set(self.columns) <= set(columns) and not set(self.without) & set(columns)


FORMATS: Registry[Format] = Registry("data format")


def detect(columns: Columns) -> str:
    """The name of the one format that a record with `columns` has.

    Raises UserError when no format fits or more than one does, and for preferences, which are not trained on here.
    """
    fitting = [name for name in FORMATS if FORMATS[name].fits(columns)]
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            "the columns chosen and rejected are preferences, which are not trained on here."
            + _chosen_alone(columns["chosen"], columns.get("prompt"))
        )
    if fitting and fitting != ["text"]:
        _refuse_ratings(columns, fitting[0])
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(columns)
    if fitting:
        raise UserError(f"the columns {found} fit more than one format ({', '.join(fitting)}); choose one by `format:`")
    known = [column for name in FORMATS for column in FORMATS[name].columns]
    hints = "".join(did_you_mean(column, known) for column in [*columns][:8])
    needs = "; ".join(f"{name}: {FORMATS[name]}" for name in FORMATS)
    raise UserError(
        f"the columns {found} fit no format.{hints} Rename them by `fields: {{ours: theirs}}`. "
        f"Formats and their columns: {needs}."
    )


def _refuse_ratings(columns: Columns, name: str) -> bool:
    """Raises UserError where a column says of the answer that it is good or bad; `name`: the format of the record.

    False: the column is another thing, a number beyond 0, 1 and -1, so that those are no ratings in its source either.
    """
    for column in RATING_COLUMNS:
        value = columns.get(column)
        word = value.strip().casefold() if isinstance(value, str) else value
        number = _number(word)
        if number is not None and not math.isnan(number) and number not in (0, 1, -1):
            return False
        if number in (0, 1, -1) or (isinstance(word, str) and word in _RATINGS):
            raise UserError(
                f"the column {column} ({value!r}) says whether the answer is good or bad, and such preferences are not "
                "trained on here; all answers would be trained alike. Keep the good ones, or set "
                f"`format: {name}` to train on all"
            )
    return True


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | bool | int | float) else None
    except (ValueError, OverflowError):
        return None


def _chosen_alone(chosen: Any, prompt: Any) -> str:
    """How the chosen answers of preferences can be trained on."""
    if isinstance(chosen, list) and not isinstance(prompt, list):
        form, column = "messages", "messages"
    elif prompt is not None:
        form, column = "prompt_completion", "completion"
    else:
        return ""
    return f" To train on the chosen answers alone set `format: {form}` and `fields: {{{column}: chosen}}`"


class Renderer:
    """Makes samples of the records of one source: of the format `name`, with the options of `config`."""

    def __init__(
        self,
        name: str,
        config: RenderConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        detected: bool,
        day: date | None = None,
    ) -> None:
        """`detected`: the format was told from the columns of the first record, and not chosen by the user.
        `day`: what chat templates are told that the date is; default: today.

        `unread` collects the columns of the rendered records that the format does not read.
        Raises UserError for options that do not apply to the format, and when its chat template cannot be used.
        """
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self._format = FORMATS[name]
        self._detected = detected
        self._day = day
        self._seen: set[tuple[str, ...]] = set()
        self._may_be_rated = detected and name != "text"
        self.unread: dict[str, None] = {}
        if self._format.own_mask and config.train_on != "assistant":
            raise UserError(
                f"records of format {name!r} say themselves what is trained; remove `train_on: {config.train_on}`"
            )
        if not self._format.chat:
            self.refuse_chat_options(f"records of format {name!r}")
        if config.split_turns and config.train_on != "assistant":
            raise UserError(
                f"`split_turns: true` trains every assistant turn by itself, and `train_on: {config.train_on}` says "
                "otherwise; remove one of the two"
            )

    @cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.config, self._day)

    @property
    def dated(self) -> bool:
        """Whether what is written depends on the date."""
        if not self._format.chat:
            return False
        return CLOCK in str(self.chat.text if self.config.chat_template else self.tokenizer.chat_template)

    @cached_property
    def special(self) -> tuple[str, ...]:
        return special_texts(self.tokenizer)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id of the tokenizer."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def trains(self, *, last: bool, prompt: bool = False) -> bool:
        """Whether a part of a record is trained: an answer, the `last` one or an earlier one, or a `prompt`."""
        return self.config.train_on == "all" or (not prompt and (last or self.config.train_on == "assistant"))

    def refuse_chat_options(self, what: str) -> None:
        """Raises UserError when an option is set that is for conversations, and `what` are none."""
        for option in ("chat_template", "template_options", "split_turns"):
            if getattr(self.config, option):
                raise UserError(f"`{option}` is for conversations, and {what} are none; remove it")

    def __call__(self, columns: Columns) -> list[Rendered]:
        """The samples of a record.

        Raises UserError when the record is of another format, when a column is missing or unfit, and when a text
        cannot be written as UTF-8.
        """
        (samples,) = self.many([columns])
        if isinstance(samples, UserError):
            raise samples
        return samples

    def many(self, records: Sequence[Columns]) -> list[list[Rendered] | UserError]:
        """The samples of each record, or what is wrong with it. The conversations are rendered together, at less cost
        than one by one; what follows a wrong record may be left out."""
        found: list[list[Rendered] | Dialogue | UserError] = []
        for columns in records:
            try:
                found.append(self._read(columns))
            except UserError as error:
                found.append(error)
                break
            except (RecursionError, OverflowError, UnicodeError) as error:
                found.append(UserError(f"the record cannot be rendered ({type(error).__name__}: {error})"))
                break
        dialogues = [read for read in found if isinstance(read, Dialogue)]
        written = iter(self.chat.samples(dialogues) if dialogues else [])
        return [self._checked(next(written) if isinstance(read, Dialogue) else read) for read in found]

    def _checked(self, samples: Sequence[Rendered] | UserError) -> list[Rendered] | UserError:
        if isinstance(samples, UserError):
            return samples
        try:
            for sample in samples:
                if isinstance(sample, Text):
                    _check_unicode(str(sample))
        except UserError as error:
            return error
        return list(samples)

    def _read(self, columns: Columns) -> list[Rendered] | Dialogue:
        if tuple(columns) not in self._seen:
            self._check_columns(columns)
            self._seen.add(tuple(columns))
            read = {*self._format.columns, *self._format.optional}
            self.unread |= {column: None for column in columns if column not in read}
        if self._may_be_rated:
            self._may_be_rated = _refuse_ratings(columns, self.name)
        return self._format.render(columns, self)

    def _check_columns(self, columns: Columns) -> None:
        other = next((name for name in FORMATS if name != self.name and FORMATS[name].fits(columns)), None)
        if self._detected and other and not self._format.fits(columns):
            raise UserError(
                f"this record is of format {other!r} (columns {', '.join(columns)}), and the first one of its source "
                f"is of format {self.name!r}; give each its own file and source"
            )
        for column in self._format.columns:
            if column not in columns:
                raise UserError(
                    f"format {self.name!r} needs the column {column!r}.{did_you_mean(column, columns)} "
                    f"Found: {', '.join(columns) or 'none'}. Rename columns by `fields: {{{column}: theirs}}`."
                )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = ascii(error.object[error.start])
        raise UserError(f"the text holds {broken}, half of a surrogate pair, which is no character") from None


def _string(columns: Columns, name: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise UserError(f"column {name!r} must be a string, not {value!r:.60}")
    return value


def _optional(columns: Columns, name: str) -> str:
    """The text of a column that may be missing; empty then."""
    return "" if columns.get(name) is None else _string(columns, name)


def _text(columns: Columns, renderer: Renderer) -> list[Rendered]:
    return [Text((Segment(_string(columns, "text"), True),), splittable=True)]


def _answer(prompt: str, answer: str, renderer: Renderer) -> list[Rendered]:
    return [Text((Segment(prompt, renderer.trains(last=True, prompt=True)), Segment(answer, True)))]


def _input_output(columns: Columns, renderer: Renderer) -> list[Rendered]:
    return _answer(_string(columns, "input"), _string(columns, "output"), renderer)


def _prompt_completion(columns: Columns, renderer: Renderer) -> list[Rendered] | Dialogue:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        renderer.refuse_chat_options("a prompt and a completion that are strings")
        _refuse_conversation_columns(columns)
        return _answer(prompt, completion, renderer)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise UserError(
            "the columns 'prompt' and 'completion' must be two strings or two lists of messages, not "
            f"{prompt!r:.40} and {completion!r:.40}"
        )
    given = _with_system(check_messages(prompt, "prompt"), columns)
    if renderer.config.train_on != "all":
        given = [message | ({"train": False} if message["role"] == "assistant" else {}) for message in given]
    return _conversation([*given, *check_messages(completion, "completion")], columns)


def _refuse_conversation_columns(columns: Columns) -> None:
    for column, given in (("system", _optional(columns, "system")), ("tools", check_tools(columns.get("tools")))):
        if given:
            raise UserError(
                f"the column {column!r} is for conversations, and a prompt and a completion that are strings are none: "
                "the model would not read it. Write its text into the prompt, or write prompt and completion as lists "
                f"of messages; to leave it out set `fields: {{unread: {column}}}`"
            )


def _instruction(columns: Columns, renderer: Renderer) -> list[Rendered]:
    """Alpaca's headings; the rounds of `history`, pairs of instruction and answer, stand before, each with its EOS."""
    segments: list[Segment] = []
    if system := _optional(columns, "system"):
        segments.append(Segment(system + "\n\n", renderer.trains(last=False, prompt=True)))
    for instruction, answer in _history(columns.get("history")):
        eos = renderer.tokenizer.eos_token
        if not isinstance(eos, str) or getattr(renderer.tokenizer, "split_special_tokens", False):
            raise UserError(
                "the column 'history' needs the tokenizer's EOS token behind each answer, and this tokenizer has none "
                'or reads it as plain text; set "eos_token", and "split_special_tokens": false, in its '
                "tokenizer_config.json"
            )
        trained = renderer.trains(last=False)
        segments += [
            Segment(_alpaca(instruction, ""), renderer.trains(last=False, prompt=True)),
            Segment(answer, trained),
            Segment(eos, trained, ends=True),
            Segment("\n\n", renderer.trains(last=False, prompt=True)),
        ]
    prompt = _alpaca(_string(columns, "instruction"), _optional(columns, "input"))
    segments += [
        Segment(prompt, renderer.trains(last=True, prompt=True)),
        Segment(_string(columns, "output"), True),
    ]
    return [Text(tuple(segments))]


def _alpaca(instruction: str, given: str) -> str:
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _history(value: Any) -> list[tuple[str, str]]:
    rounds = cast(list[Any], [] if value is None else value)
    if not isinstance(value, list | None) or not all(
        isinstance(pair, list | tuple) and [type(said) for said in cast(list[Any], pair)] == [str, str]
        for pair in rounds
    ):
        raise UserError(f"column 'history' must be a list of pairs [instruction, answer], not {value!r:.60}")
    return [(pair[0], pair[1]) for pair in rounds]


def _messages(columns: Columns, renderer: Renderer) -> list[Rendered] | Dialogue:
    messages = _with_system(check_messages(columns["messages"], "messages"), columns)
    return _conversation(messages, columns)


def _with_system(messages: list[Message], columns: Columns) -> list[Message]:
    """The messages after the text of the column `system`, where there is one."""
    system = _optional(columns, "system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise UserError("there are a column 'system' and a system message; keep one of them")
    return [{"role": "system", "content": system}, *messages]


def _conversations(columns: Columns, renderer: Renderer) -> list[Rendered] | Dialogue:
    messages = _with_system(from_sharegpt(columns["conversations"]), columns)
    return _conversation(messages, columns)


def _conversation(messages: list[Message], columns: Columns) -> Dialogue:
    return Dialogue(messages, check_tools(columns.get("tools")))


def _segments(columns: Columns, renderer: Renderer) -> list[Rendered]:
    """Text with its own mask, special tokens included, as in axolotl's template-free form."""
    value = columns["segments"]
    if not isinstance(value, list) or not value:
        raise UserError(f"column 'segments' must be a list with at least one segment, not {value!r:.60}")
    segments: list[Segment] = []
    for i, part in enumerate(cast(list[Any], value), 1):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UserError(f"segment {i} must be an object with a `text` and `train`, not {part!r:.60}")
        flags = [part[name] for name in ("train", "label") if name in part]
        if len(flags) != 1 or not isinstance(flags[0], bool):
            raise UserError(f"segment {i} needs `train` (or `label`), true or false; got {part!r:.60}")
        text, trained = part["text"], flags[0]
        mark = special_end(text, renderer.special) if trained else ""
        segments += [Segment(text[: len(text) - len(mark)], trained), Segment(mark, trained, ends=True)]
    return [Text(tuple(segment for segment in segments if segment.text), document=False)]


def _tokens(columns: Columns, renderer: Renderer) -> list[Rendered]:
    ids = _whole_numbers(columns["input_ids"], "input_ids")
    given = columns.get("labels")
    labels = ids if given is None else _whole_numbers(given, "labels")
    mask = columns.get("attention_mask")
    present = np.ones(len(ids), np.int64) if mask is None else _whole_numbers(mask, "attention_mask")
    for name, values in (("labels", labels), ("attention_mask", present)):
        if len(values) != len(ids):
            raise UserError(f"column {name!r} has {len(values)} values and 'input_ids' has {len(ids)}")
    outside = (ids < 0) | (ids >= renderer.vocab_size)
    if outside.any():
        raise UserError(
            f"column 'input_ids' holds {ids[outside][0]} at place {np.argmax(outside)}, outside the tokenizer's "
            f"vocabulary of {renderer.vocab_size}; tokenize the data with this model's tokenizer"
        )
    wrong = (labels != ids) & (labels != UNTRAINED)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise UserError(
            f"column 'labels' has {labels[place]} at place {place}, where 'input_ids' has {ids[place]}; a label is "
            f"the id at the same place, or {UNTRAINED} where it is not trained. Do not shift labels"
        )
    kept = np.flatnonzero(present)
    if len(kept) and (kept[-1] - kept[0] >= len(kept) or set(present.tolist()) - {0, 1}):
        raise UserError("column 'attention_mask' must be 1 on one stretch of tokens and 0 on padding around it")
    trained = labels[kept] != UNTRAINED
    return [Tokens(ids[kept], trained, masked=not trained.all())]


def _whole_numbers(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, list) or not all(type(number) is int for number in cast(list[Any], value)):
        raise UserError(f"column {name!r} must be a list of whole numbers, not {value!r:.60}")
    try:
        return np.array(value, np.int64)
    except OverflowError:
        place = next(i for i, number in enumerate(value) if not -(2**63) <= number < 2**63)
        raise UserError(f"column {name!r} holds {_cut(value[place])} at place {place}, beyond 64 bits") from None


def _cut(number: int) -> str:
    return f"a number of {number.bit_length()} bits" if number.bit_length() > 200 else str(number)


_STOP_CHAT = (
    "have the chat template write the tokenizer's EOS, or a mark of its own, behind each turn of the assistant, inside "
    "{% generation %} where it has such blocks"
)
_STOP_SEGMENTS = "let a trained segment end with the tokenizer's EOS token"
_STOP_TOKENS = "give the id that ends a text itself as its label, and not the one of padding"

FORMATS.add("text", Format(("text",), _text))
FORMATS.add("instruction", Format(("instruction", "output"), _instruction, ("input", "system", "history")))
FORMATS.add("input_output", Format(("input", "output"), _input_output, without=("instruction",)))
for _name, _columns, _render in (
    ("prompt_completion", ("prompt", "completion"), _prompt_completion),
    ("messages", ("messages",), _messages),
    ("conversations", ("conversations",), _conversations),
):
    FORMATS.add(_name, Format(_columns, _render, ("tools", "system"), chat=True, stop=_STOP_CHAT))
FORMATS.add("segments", Format(("segments",), _segments, own_mask=True, stop=_STOP_SEGMENTS))
FORMATS.add("tokens", Format(("input_ids",), _tokens, ("labels", "attention_mask"), own_mask=True, stop=_STOP_TOKENS))
