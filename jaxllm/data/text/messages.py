"""Conversations as records have them, checked and brought into the one form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.data.records.json_text import JsonError, parse_json

Message = dict[str, Any]

ARGUMENT_FORMS = ("text", "object")  # of a tool call's arguments: OpenAI writes JSON text
PROBED = {"jaxllm_key": "jaxllm value"}  # arguments that tell what a template makes of either

# ShareGPT's roles → ours. A function call becomes the `tool_calls` of an assistant message.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
TRAIN_FLAGS = ("train", "weight")
# What others call the flag that says whether a message is trained; read over, it would train what must not be.
_FOREIGN_FLAGS = ("training", "trainable", "loss", "mask", "masked", "train_on_turn")


def check_messages(value: Any, column: str) -> list[Message]:
    """The messages of a column, without keys that hold null, each with its `train` flag where it has one.

    A message has a `role` and, as text, a `content`, or `tool_calls`; further keys go to the template as they are.
    `weight: 0` is `train: false`.
    Raises UserError naming the first message that is none.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"column {column!r} must be a list of messages with at least one, not {value!r:.60}")
    return [_check_message(message, i) for i, message in enumerate(cast(list[Any], value), 1)]


def from_sharegpt(value: Any) -> list[Message]:
    """The messages of a `conversations` column, whose items are `{from, value}`.

    Raises UserError naming the first item that is none.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"column 'conversations' must be a list of turns with at least one, not {value!r:.60}")
    messages: list[Message] = []
    for i, turn in enumerate(cast(list[Any], value), 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise UserError(f"turn {i} must be an object with `from` and `value`, not {turn!r:.60}")
        if turn["from"] not in SHAREGPT_ROLES:
            hint = did_you_mean(turn["from"], SHAREGPT_ROLES)
            raise UserError(f"turn {i} is from {turn['from']!r}.{hint} Known: {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise UserError(f"turn {i}: `value` must be a string, not {turn.get('value')!r:.60}")
        flags = {name: turn[name] for name in (*TRAIN_FLAGS, *_FOREIGN_FLAGS) if name in turn}
        said = {"content": turn["value"]}
        if turn["from"] == "function_call":
            said = {"tool_calls": _sharegpt_calls(turn["value"], i)}
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], **said, **flags})
    return check_messages(messages, "conversations")


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a record: a list of JSON schemas, or that list as a JSON string. None if there is none.

    Raises UserError for anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except JsonError as error:
            raise UserError(f"column 'tools' is not JSON: {error}") from None
    if not value or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in cast(list[Any], value)):
        raise UserError(f"column 'tools' must be a list of JSON schemas, or that list as a string, not {value!r:.60}")
    return cast(list[dict[str, Any]], value)


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a tool or of a tool call, which stands in its `function` or beside it."""
    function = tool.get("function")
    name = cast(Mapping[str, Any], function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else None


def _check_message(message: Any, i: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"message {i} must be an object with a `role` and a `content`, not {message!r:.60}")
    kept: Message = {key: value for key, value in cast(Message, message).items() if value is not None}
    for flag in _FOREIGN_FLAGS:
        if flag in kept:
            raise UserError(f"message {i} has the key {flag!r}; whether a message is trained is said by `train`")
    kept |= _train_flag(kept, i)
    kept.pop("weight", None)
    if "tool_calls" in kept:
        kept["tool_calls"] = _check_calls(kept["tool_calls"], i)
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    content = kept.get("content", "" if "tool_calls" in kept else None)
    if not isinstance(content, str):
        raise UserError(f"message {i}: `content` must be a string, not {content!r:.60}")
    if kept["role"] == "assistant" and kept.get("train", True) and not (content.strip() or "tool_calls" in kept):
        raise UserError(
            f"message {i}: the assistant says nothing, which would be trained. Remove the message or mark it "
            "`train: false`"
        )
    return kept


def _train_flag(message: Message, i: int) -> dict[str, bool]:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"message {i}: `train` must be true or false, not {train!r:.60}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"message {i}: `weight` must be 0 or 1, not {weight!r:.60}; a message is trained or it is not")
    if train is not None and weight is not None and train != bool(weight):
        raise UserError(f"message {i}: `train` and `weight` contradict each other")
    flag = train if weight is None else bool(weight)
    if flag and message["role"] != "assistant":
        raise UserError(
            f"message {i} is the {message['role']}'s and marked to be trained; only the assistant's messages can be. "
            "To train on everything set `train_on: all`"
        )
    return {} if flag is None else {"train": flag}


def _check_calls(calls: Any, i: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise UserError(f"message {i}: `tool_calls` must be a list, not {calls!r:.60}")
    checked: list[dict[str, Any]] = []
    for call in cast(list[Any], calls):
        if not isinstance(call, dict) or tool_name(cast(dict[str, Any], call)) is None:
            raise UserError(f"message {i}: a tool call needs a `function` with a `name`, not {call!r:.60}")
        call = cast(dict[str, Any], call)
        wrapped = isinstance(call.get("function"), dict)
        function = dict(call["function"] if wrapped else call)
        function["arguments"] = _arguments(function.get("arguments"), i)
        checked.append({**call, "function": function} if wrapped else function)
    return checked


def _arguments(arguments: Any, i: int) -> Any:
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return arguments if arguments.strip() and parse_json(arguments) is not None else {}
    except JsonError as error:
        raise UserError(f"message {i}: the arguments of a tool call are not JSON: {error.what}") from None


def tool_arguments(message: Message, form: str, probed: Any = None) -> Message:
    """The message with the arguments of its tool calls as "text" (JSON), as "object", or as they are ("given").

    probed: what to put in their place.
    """
    if "tool_calls" not in message:
        return message
    calls: list[dict[str, Any]] = []
    for call in message["tool_calls"]:
        wrapped = isinstance(call.get("function"), dict)
        function = dict(call["function"] if wrapped else call)
        arguments = function["arguments"] if probed is None else probed
        if form == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif form == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments)
        function["arguments"] = arguments
        calls.append({**call, "function": function} if wrapped else function)
    return {**message, "tool_calls": calls}


def form_of_arguments(text: str, by_object: str) -> str:
    """How a template takes the arguments of tool calls: as "text", as an "object", or as they are "given".

    text, by_object: what it wrote of `PROBED` in either form; empty where it failed.
    """
    takes_text = json.dumps(PROBED) in text
    (key, value), *_ = PROBED.items()
    takes_object = value in by_object and f"{{{key!r}" not in by_object
    if takes_text != takes_object:
        return "text" if takes_text else "object"
    return "given"


def _sharegpt_calls(value: str, i: int) -> list[dict[str, Any]]:
    try:
        calls = parse_json(value)
    except JsonError as error:
        raise UserError(f"turn {i}: a function call must be JSON: {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f'turn {i}: a function call must be {{"name": …, "arguments": …}}, not {value:.60}')
    return [{"type": "function", "function": call} for call in calls]
