"""Which characters of a turn the model is to say, told from the renderings of its conversation."""

from __future__ import annotations

import json
from typing import NamedTuple

from jaxllm.core.errors import UserError
from jaxllm.data.text.messages import Message, tool_name
from jaxllm.data.text.turns import (
    PROBE,
    Marks,
    Openings,
    after_opening,
    end_of_turn,
    opened_reasoning,
    said_until,
    written_between,
)


class Turn(NamedTuple):
    """The spans of characters of a turn that the model is to say: of `text`, or else of the whole conversation."""

    spans: list[tuple[int, int]]
    text: str | None = None


class View(NamedTuple):
    """Message `i` of a conversation in four renderings: the prompt that asks for it, the conversation up to it, the
    whole conversation, and, if it is the last message, a conversation that continues after it."""

    messages: list[Message]
    i: int
    opened: str
    closed: str
    whole: str
    followed: str | None
    opens: Openings

    @property
    def message(self) -> Message:
        return self.messages[self.i]

    @property
    def last(self) -> bool:
        return self.i == len(self.messages) - 1


class TurnFinder:
    """Finds what is trained of the turns that a template without `{% generation %}` blocks writes."""

    def __init__(self, name: str, marks: Marks) -> None:
        """name: what messages call the template."""
        self._name = name
        self._marks = marks

    def turn(self, view: View) -> Turn:
        """What the model is to say in the turn. Raises UserError where that cannot be told from the renderings."""
        message, i, opened, closed = view.message, view.i, view.opened, view.closed
        reasoning = opened_reasoning(opened)
        doubled = reasoning and closed[len(opened) :].lstrip().startswith(reasoning.tag)
        if reasoning and (doubled or not closed.startswith(opened)) and closed.startswith(reasoning.before):
            start = len(reasoning.before)
            end = self._end(view, start)
            said = after_opening(message, reasoning, closed[start:end])
            if said is None:
                raise UserError(
                    f"{self._name} opens the reasoning, by {reasoning.tag!r}, when it asks for an answer "
                    f"({_difference(opened, closed)[0]!r}), and message {i + 1} has none, so what the model is to say "
                    f"cannot be told. Give the message a `reasoning_content`, or a content that begins with "
                    f"{reasoning.tag} … {reasoning.closing}, empty where it is to answer at once; or give a template "
                    "by `chat_template:` whose prompt does not open it, or options by `template_options:`"
                )
            if not view.last:
                raise self._rewrites(i, *_difference(opened + said, view.whole))
            self.check_answer(message, i, said, reasoning.tag)
            return Turn([(len(opened), len(opened) + len(said))], opened + said)
        if not closed.startswith(opened):
            asked, written = _difference(opened, closed)
            raise UserError(
                f"{self._name} writes {asked!r} when it asks for an answer and {written!r} for the finished one "
                f"(message {i + 1}), so what the model is to say cannot be told. Give a template by `chat_template:` "
                "that writes both alike or has the trained text in {% generation %} blocks, or options by "
                "`template_options:`"
            )
        end = self._end(view, len(opened))
        # Where the prompt itself opens the reasoning, the turn holds its mark and the trained text does not.
        self.check_answer(message, i, closed[len(opened) : end], reasoning.tag if reasoning else "")
        return Turn([(len(opened), end)])

    def _end(self, view: View, start: int) -> int:
        """Where the turn ends that begins at character `start` of `view.closed`."""
        closed, message = view.closed, view.message
        length, known = said_until(closed[start:], message)
        said = start + length
        if not view.last:

            def shared(end: str) -> bool:
                return view.whole.startswith(closed[:said] + end)
        elif view.followed is not None:
            region = written_between(view.followed, view.messages[view.i - 1])

            def shared(end: str) -> bool:
                return known + end in region
        else:

            def shared(end: str) -> bool:
                return True

        if not view.last and not shared(""):
            raise self._rewrites(view.i, *_difference(closed, view.whole))
        prompt = written_between(view.opened + PROBE, view.messages[view.i - 1])
        end = end_of_turn(closed[said:], shared, prompt, view.opens, self._marks, last=view.last)
        if end is None and not view.last and not any(mark in closed[said:] for mark in view.opens.marks):
            raise self._rewrites(view.i, *_difference(closed, view.whole))
        if end is None:
            raise UserError(
                f"where the answer of message {view.i + 1} ends cannot be told: {self._name} writes "
                f"{closed[said:][:60]!r} behind it, of which another turn, or the prompt for one, follows in part, so "
                "too much would be trained. Let the template write a special token of the tokenizer behind each answer "
                "and ask for the next one within `{% if add_generation_prompt %}` only, or put what the assistant says "
                "into {% generation %} blocks"
            )
        return said + len(end)

    def _rewrites(self, i: int, before: str, after: str) -> UserError:
        return UserError(
            f"{self._name} rewrites earlier turns: with message {i + 1} as the last one it writes {before!r} where "
            f"it writes {after!r} when more follows, so the model would be trained on what it never says. Set "
            "`split_turns: true` to train each turn as the end of a conversation, or `train_on: last`, or give a "
            "template that only appends by `chat_template:`"
        )

    def check_answer(self, message: Message, i: int, turn: str, opening: str) -> None:
        """Raises UserError unless the text of a turn, behind an `opening` of the prompt, holds what the message
        says."""
        written = squeezed(turn)
        names = [tool_name(call) for call in message.get("tool_calls", ())]
        for said in (message.get("content"), message.get("reasoning_content"), *names):
            if isinstance(said, str) and not (
                holds(written, said) or (opening and holds(squeezed(opening) + written, said))
            ):
                raise UserError(
                    f"{self._name} leaves out or changes what the assistant says in message {i + 1} ({said!r:.60}), so "
                    "it would not be trained; give a template that writes it by `chat_template:`"
                )


def _difference(one: str, other: str, before: int = 12, width: int = 40) -> tuple[str, str]:
    """What two texts have around the place where they part."""
    alike = (a == b for a, b in zip(one, other, strict=False))
    place = next((i for i, same in enumerate(alike) if not same), min(len(one), len(other)))
    around = slice(max(0, place - before), place + width)
    return one[around], other[around]


def squeezed(text: str) -> str:
    """A text without its white space, which templates change."""
    return "".join(text.split())


def holds(written: str, said: str) -> bool:
    """Whether a squeezed text has `said`, as it is or as templates write the results of tools: in JSON."""
    return squeezed(said) in written or squeezed(json.dumps(said, ensure_ascii=False)[1:-1]) in written
