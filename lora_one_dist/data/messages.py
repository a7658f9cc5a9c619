"""A row to the messages that a template takes, and to which of them are learned.

In: a row of format chat, as JSON or a typed file holds it.  Out: :class:`Chat`.  Whatever cannot be taken is refused by
message, value and remedy; what a user wrote is never dropped in silence.  Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_one_dist.data import json_text
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.template import REASONING, Template

# What else the three are called where data come from.
ROLES = {"human": "user", "observation": "tool", "function_response": "tool"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai", "bot"), "assistant")
# One meaning, 0 or 1: is an assistant's turn learned?  What else may mean it, or its opposite, is refused.
WEIGHTS = ("weight", "train", "trainable")
UNCLEAR = {"training", "loss", "loss_mask", "loss_weight", "mask", "masked", "ignore", "learn", "skip", "is_masked"}
LABELS = {"role", "name", "id", "tool_call_id", "call_id", "type", "index"}  # templates may leave them out


@dataclass(frozen=True)
class Chat:
    """What a row says."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    weights: list[int]
    """By message, 0: not learned."""

    @functools.cached_property
    def last_question(self) -> int:
        """Number of the last user message; -1: there is none."""
        return max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=-1)

    def answers(self) -> list[int]:
        """Numbers of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_chat(raw: Any, tools: list[Any] | None, column: str, template: Template) -> Chat:
    """The chat of a row.

    Args:
        raw: what the column of the messages holds.  column: its name, for errors.
        tools: what :func:`read_tools` returned.

    Raises DataError: naming the message, what is wrong with it, and the remedy.
    """
    if not (isinstance(raw, list) and raw and all(isinstance(message, Mapping) for message in raw)):
        raise DataError(f"{column} = {raw!r:.80}: must be a list of {{role, content}}. Mend the row")
    messages, weights = [], []
    for number, given in enumerate(raw):
        where = f"message {number + 1}"
        message = {key: value for key, value in given.items() if value is not None}
        if "from" in message and "role" not in message:
            message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise DataError(f"{where} = {dict(given)!r:.80}: must have a role. Mend the row")
        if message["role"] == "function_call":
            rule = f"{where} has the role 'function_call', which no template writes as an assistant's"
            raise DataError(f"{rule}. Give it the role assistant, and the call as tool_calls")
        message["role"] = ROLES.get(message["role"], message["role"])
        where = f"{where} ({message['role']})"
        weights.append(_take_weight(message, where))
        _check_keys(message, where, template)
        messages.append(_as_templates_take_it(message, where, template))
    if tools and not template.reads("tools"):
        rule = "the row has tools, which the chat template never reads"
        raise DataError(f"{rule}: calls would be learned that nothing offered. Set data.tools: none to leave them out")
    return Chat(messages, tools, weights)


def _take_weight(message: dict[str, Any], where: str) -> int:
    """Of a message, whose key for it is taken out."""
    if unclear := sorted(UNCLEAR & message.keys()):
        raise DataError(f"{where} has {unclear[0]!r}, which may mean a weight or its opposite. Write weight: 0 or 1")
    found = {key: message.pop(key) for key in WEIGHTS if key in message}
    if bad := [f"{key} = {value!r}" for key, value in found.items() if value not in (0, 1)]:
        raise DataError(f"{where}: {bad[0]:.80}: must be 0 or 1. Mend the row")
    if len({int(value) for value in found.values()}) > 1:
        raise DataError(f"{where}: {found} contradict each other. Leave one of them")
    weight = next((int(value) for value in found.values()), None)
    if weight == 1 and message["role"] != "assistant":
        raise DataError(f"{where} has a weight of 1, but only an assistant's turns are learned. Take the weight out")
    return 1 if weight is None else weight


def _check_keys(message: Mapping[str, Any], where: str, template: Template) -> None:
    """Something must be said, nothing twice, and no key that holds something be one that the template never reads."""
    said = [key for key in message if key not in LABELS]
    if not said:
        raise DataError(f"{where} says nothing: must be a list of {{role, content}}, or of calls. Mend the row")
    thoughts = {key: message[key] for key in REASONING if message.get(key)}
    if len({str(thought) for thought in thoughts.values()}) > 1:
        raise DataError(f"{where} has different thoughts in {list(thoughts)}: of one meaning. Leave one of them")
    for key in said:
        if message[key] in ("", [], {}):
            continue
        if key != "content" and not any(map(template.reads, REASONING if key in REASONING else [key])):
            rule = f"{where} has {key!r}, which the chat template never reads"
            raise DataError(f"{rule}. Take it out of the row, or take a template that renders it")


def _as_templates_take_it(message: dict[str, Any], where: str, template: Template) -> dict[str, Any]:
    """Content as one text, and calls whose arguments are objects (or text, where the template adds it to text)."""
    if "content" in message:
        message["content"] = _joined(message["content"], where)
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"{where}: tool_calls = {calls!r:.80}: must be a list of calls. Mend the row")
        message["tool_calls"] = [_call(call, where, template) for call in calls]
    if isinstance(message.get("function_call"), Mapping):
        message["function_call"] = _call(message["function_call"], where, template)
    return message


def _joined(content: Any, where: str) -> str:
    """The text of a content, which may be a list of text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if bad := [part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str)]:
        kind = bad[0].get("type") if isinstance(bad[0], Mapping) else bad[0]
        raise DataError(f"{where} has a content of {kind!r:.60}: must be text, or parts of type text. Mend the row")
    return "".join(map(str, texts))


def _call(call: Mapping[str, Any], where: str, template: Template) -> dict[str, Any]:
    """A call whose arguments are as the template takes them."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], where, template)}
    if "arguments" not in call:
        return dict(call)
    given = call["arguments"]
    try:
        value = json_text.decode(given or "{}") if isinstance(given, str) else given
    except ValueError:
        value = None
    if not isinstance(value, Mapping):
        rule = "must be an object, or JSON text of one"
        raise DataError(f"{where}: arguments of {call.get('name')} = {given!r:.80}: {rule}. Mend the row")
    if not template.takes_text_arguments:
        return {**call, "arguments": value}
    return {**call, "arguments": given if isinstance(given, str) else json_text.encode(value)}


def read_tools(given: Any) -> list[Any] | None:
    """Tools as templates take them, of a list or its JSON text; None: there are none.  Raises DataError."""
    if given is None or given == "":
        return None
    try:
        tools = json_text.decode(given) if isinstance(given, str) else given
    except ValueError as error:
        raise DataError(f"tools = {given!r:.80}: is no JSON text ({error}). Mend the row") from None
    held = [tool.get("function", tool) if isinstance(tool, Mapping) else tool for tool in tools or []]
    if not isinstance(tools, list) or not all(isinstance(function, Mapping) for function in held):
        raise DataError(f"tools = {given!r:.80}: must be a list of tools, or JSON text of one. Mend the row")
    return tools or None
