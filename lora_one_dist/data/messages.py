"""A row to the messages that a template takes, and to what of them is learned and must be seen in the text.

In: a row of format chat, as JSON or a typed file holds it.  Out: :class:`Chat`.  Whatever cannot be taken is refused by
message, value and remedy; what a user wrote is never dropped in silence.  Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_one_dist.data import json_text
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.template import REASONING, Template

SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
# One meaning, 0 or 1: is an assistant's turn learned?  What else may mean it, or its opposite, is refused.
WEIGHTS = ("weight", "train", "trainable")
UNCLEAR = {"training", "loss", "loss_mask", "loss_weight", "mask", "masked", "ignore", "learn", "skip", "is_masked"}
LABELS = {"role", "name", "id", "tool_call_id", "call_id", "type", "index"}  # templates may leave them out
THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """Text of a message that its rendering must hold."""

    text: str
    is_thought: bool = False
    """A template may drop the thoughts of earlier turns."""


@dataclass(frozen=True)
class Chat:
    """What a row says."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    weights: list[int]
    """By message, 0: not learned."""

    @property
    def last_question(self) -> int:
        """Number of the last user message; -1: there is none."""
        return max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=-1)

    def answers(self) -> list[int]:
        """Numbers of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_chat(raw: Any, tools: Any, column: str, template: Template) -> Chat:
    """The chat of a row.

    Args:
        raw: what the column of the messages holds.  column: its name, for errors.
        tools: a list, its JSON text, or None.

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
        message["role"] = SHAREGPT.get(message["role"], message["role"])
        where = f"{where} ({message['role']})"
        weights.append(_take_weight(message, where))
        _check_keys(message, where, template)
        messages.append(_as_templates_take_it(message, where, template))
    return Chat(messages, _read_tools(tools, template), weights)


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
    """Something must be said, and no key with a text be one that the template never reads."""
    said = [key for key in message if key not in LABELS]
    if not said:
        raise DataError(f"{where} says nothing: must be a list of {{role, content}}, or of calls. Mend the row")
    for key in said:
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


def _read_tools(given: Any, template: Template) -> list[Any] | None:
    """Tools as templates take them."""
    if given is None or given == "":
        return None
    try:
        tools = json_text.decode(given) if isinstance(given, str) else given
    except ValueError as error:
        raise DataError(f"tools = {given!r:.80}: is no JSON text ({error}). Mend the row") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools = {given!r:.80}: must be a list of tools, or JSON text of one. Mend the row")
    if tools and not template.reads("tools"):
        rule = "the row has tools, which the chat template never reads"
        raise DataError(f"{rule}: calls would be learned that nothing offered. Set data.tools: none to leave them out")
    return tools or None


def thoughts(message: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(begin, end) in an assistant's content of the texts that ``</think>`` ends; some data leave ``<think>`` out."""
    content, at = message.get("content") or "", 0
    while message["role"] == "assistant" and (end := content.find(END_THINK, at)) >= 0:
        opened = content.rfind(THINK, at, end)
        yield at if opened < 0 else opened + len(THINK), end
        at = end + len(END_THINK)


def pieces(message: Mapping[str, Any]) -> Iterator[Piece]:
    """What of a message must be in the text: thoughts, content, names of calls and the strings in their arguments."""
    for key in REASONING:
        if isinstance(message.get(key), str):
            yield Piece(message[key], True)
    content, at = message.get("content") or "", 0
    for begin, end in thoughts(message):
        yield Piece(content[at:begin].removesuffix(THINK))
        yield Piece(content[begin:end], True)
        at = end + len(END_THINK)
    yield Piece(content[at:])
    single = message.get("function_call")
    for call in [*(message.get("tool_calls") or []), *([single] if isinstance(single, Mapping) else [])]:
        function = call.get("function", call)
        if isinstance(function, Mapping):
            yield from map(Piece, _strings([function.get("name"), function.get("arguments")]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def dropped_thoughts(chat: Chat, text: str) -> int:
    """How many thoughts ``text`` does not hold, which alone it may drop.

    Raises DataError: another text of a message is not in it, in the order of the messages (a system prompt: anywhere;
    some templates put it in front of the last question), or a tool's name is not.
    """
    dropped, at = 0, 0
    for number, message in enumerate(chat.messages):
        start, ends, thinking = 0 if message["role"] == "system" else at, [at], []
        for piece in pieces(message):
            if piece.is_thought:
                thinking.append(piece.text.strip())
                continue
            found, end = _find(text, piece.text.strip(), start)
            if found < 0:
                raise _is_dropped(number, message, piece.text.strip())
            ends.append(end)
        if message["role"] != "system":
            at = max(ends)
        # In front of what is said, or nowhere: elsewhere it would be another message's.
        dropped += sum(not 0 <= _find(text, thought, start)[0] < max(at, start + 1) for thought in thinking)
    for tool in chat.tools or []:
        name = (tool.get("function") or tool).get("name")
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"the chat template drops the tool {name!r}. Set data.tools: none, or take another template"
            )
    return dropped


def _find(text: str, wanted: str, start: int) -> tuple[int, int]:
    """(begin, end) of a text as it is or as JSON has it; (-1, -1)."""
    found = text.find(wanted, start)
    if found >= 0:
        return found, found + len(wanted)
    for ascii_alone in (False, True):
        form = json_text.encode(wanted, ensure_ascii=ascii_alone)[1:-1]
        found = text.find(form, start)
        if found >= 0:
            return found, found + len(form)
    return -1, -1


def _is_dropped(number: int, message: Mapping[str, Any], wanted: str) -> DataError:
    what = f"message {number + 1} has the role {message['role']!r}, whose text {wanted!r:.60}"
    remedy = "Use a role that the template knows, or take a template that renders this message"
    return DataError(f"{what} the chat template drops or changes. {remedy}")
