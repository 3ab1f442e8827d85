"""Where a turn of the assistant ends in what a chat template wrote, told by how the template writes it elsewhere."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jaxllm.data.text.messages import Message, tool_name

# Words that no template writes by itself.
PROBE = "jaxllm-probe"
_ANSWER, _NEXT = "jaxllm-answer", "jaxllm-next"
_SEEN = 64  # characters by which a place in a text is known again

# What a prompt ends with that opens the model's reasoning: <think>, <seed:think>, [THINK].
_REASONING = re.compile(r"(?P<opening>[<\[◁][^<>\[\]◁▷/|｜\s]+[>\]▷])\s*\Z")
_REASONING_END = re.compile(r"</[^<>|｜]*think[^<>]*>|\[/THINK\]|◁/think▷", re.IGNORECASE)

# Conversations by which a template shows how it opens a turn.
OPENINGS: tuple[list[Message], ...] = (
    [{"role": "user", "content": PROBE}],
    [
        {"role": "user", "content": PROBE},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ],
)


@dataclass(frozen=True)
class Marks:
    """The tokens with which a template can mark turns: `special` ones, and all that were `added` to the vocabulary."""

    special: Sequence[str]
    added: Sequence[str]
    bos: str | None
    eos: str | None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")")

    def split(self, text: str) -> list[str]:
        """The text in pieces, each of them one added token or what is between two."""
        return [piece for piece in self._pattern.split(text) if piece] if self.added else [text][: len(text)]


class Openings(NamedTuple):
    """How a template opens turns: by the special tokens `marks`, or in plain text, where `header` opens a user's."""

    marks: frozenset[str]
    header: str = ""


def openings(first: str | None, second: str | None, marks: Marks) -> Openings:
    """What opens turns, from the two `OPENINGS` as written. A conversation begins with the opening of a turn, and no
    turn ends before it."""
    if first is None or PROBE not in first:
        return Openings(frozenset())
    start = first[: first.index(PROBE)].removeprefix(marks.bos or "")
    ends = {marks.bos, marks.eos}
    leading = itertools.takewhile(marks.added.__contains__, marks.split(start.lstrip()))
    found = {piece for piece in leading if piece not in ends}
    header = ""
    if not found and second is not None and _ANSWER in second and _NEXT in second:
        between = second[second.index(_ANSWER) + len(_ANSWER) : second.index(_NEXT)]
        header = _common_end(start, between).strip()
        found = {piece for piece in marks.split(header) if piece in marks.added and piece not in ends}
    if marks.bos and marks.bos != marks.eos and first.startswith(marks.bos):
        found.add(marks.bos)  # some templates begin each round with it
    return Openings(frozenset(found), header)


def end_of_turn(
    tail: str, shared: Callable[[str], bool], prompt: str, opens: Openings, marks: Marks, *, last: bool
) -> str | None:
    """What ends a turn: the beginning of `tail`, which the template writes behind an answer that ends a conversation.

    Args:
        shared: whether the template writes a text behind this answer also when another turn follows.
        prompt: what it writes when it asks for an answer. No mark of it is a mark that only closes a conversation.
        last: the turn is the last one, and may have an end that others have not.
    None: it cannot be told, since what follows may be the opening of another turn.
    """
    kept: list[str] = []
    for piece in marks.split(tail):
        if not shared("".join(kept) + piece):
            break
        kept.append(piece)
    for n, piece in enumerate(kept):
        opening = 0 if piece in opens.marks else piece.find(opens.header) if opens.header else -1
        if opening >= 0:
            kept[n:] = [piece[:opening]]
            break
    end = "".join(kept)
    behind = [piece for piece in marks.split(tail[len(end) :]) if piece.strip()]
    if not behind:
        return end
    closing = all(piece in marks.special and piece not in opens.marks and piece not in prompt for piece in behind)
    if any(piece in marks.special for piece in kept):
        in_plain_text = bool(opens.header) and not any(mark in opens.header for mark in opens.marks)
        return end if closing or in_plain_text or behind[0] in opens.marks else None
    return tail[: tail.index(behind[0], len(end)) + len(behind[0])] if closing and last else None


def said_until(written: str, message: Message) -> tuple[int, str]:
    """Where in `written`, a text of the assistant, all that the message says has been said; and the end of what was
    said last, by which the place is known in another text."""
    end, known = 0, ""
    for said in _said(message):
        said = said.strip()
        place = written.find(said, end) if said else -1
        if place >= 0:
            # Where a turn follows, many templates leave the reasoning out.
            end, known = place + len(said), without_reasoning(said).strip()[-_SEEN:]
    return end, known


def _said(message: Message) -> list[str]:
    said = [message.get("reasoning_content"), message.get("content")]
    for call in message.get("tool_calls", ()):
        said.append(tool_name(call))
        arguments: Any = call.get("function", call).get("arguments")
        said += arguments.values() if isinstance(arguments, Mapping) else [arguments]
    return [text for text in said if isinstance(text, str)]


def followers(message: Message) -> list[Message]:
    """Messages that can follow one of the assistant, the most likely first."""
    user: Message = {"role": "user", "content": PROBE}
    calls = message.get("tool_calls")
    if not calls:
        return [user]
    call = {"tool_call_id": calls[0].get("id", ""), "name": tool_name(calls[0]) or ""}
    return [{"role": "tool", "content": PROBE, **call}, user]


def written_between(text: str, before: Message) -> str:
    """What `text` has between what `before` says and the probe that follows."""
    text = text[: text.rindex(PROBE)]
    said = str(before.get("content", "")).strip()[-_SEEN:]
    return text[max(0, text.rfind(said)) :] if said else text


class Opened(NamedTuple):
    """A prompt that opens the model's reasoning: what stands before its tag, and the tag."""

    before: str
    tag: str
    space: str

    @property
    def closing(self) -> str:
        return f"{self.tag[0]}/{self.tag[1:]}"


def opened_reasoning(prompt: str) -> Opened | None:
    """The tag with which `prompt` opens the reasoning of the answer; None where it opens none."""
    found = _REASONING.search(prompt)
    return found and Opened(prompt[: found.start()], found["opening"], prompt[found.end("opening") :])


def after_opening(message: Message, opened: Opened, answer: str) -> str | None:
    """What the model says behind a prompt that opened its reasoning: its reasoning, then `answer`, as the template
    writes that with the end of the turn. None where the message has no reasoning."""
    content: str = message.get("content", "")
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        thought, gap = f"{reasoning.strip()}{opened.space}", opened.space * 2
    elif opened.closing in content:
        thought, _, after = content.partition(opened.closing)
        thought = thought.lstrip().removeprefix(opened.tag)
        gap = after[: len(after) - len(after.lstrip())]
    else:
        return None
    # The prompt has the white space already.
    thought = thought.lstrip() if opened.space else thought
    return f"{thought}{opened.closing}{gap}{answer.rpartition(opened.closing)[2].lstrip()}"


def without_reasoning(content: str) -> str:
    """What a content says behind the reasoning that it holds."""
    return _REASONING_END.split(content)[-1] if _REASONING_END.search(content) else content


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
