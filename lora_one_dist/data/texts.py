"""Where the texts of a chat stand in its rendering: none that a user wrote may be missing.

In: a :class:`Chat` and its rendered text.  Out: :class:`Found`.  The chat is rendered once more with marks around its
texts; where they change what the template does, the texts are searched for.  Pure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_one_dist.data import json_text
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.messages import Chat
from lora_one_dist.data.template import BEGIN, REASONING, Template

# Noncharacters again, around the number of the text that they enclose.
OPEN, CLOSE, NUMBER_END = "\ufdd2", "\ufdd3", "\ufdd4"
NONCHARACTERS = re.compile(f"[{BEGIN}-{NUMBER_END}]")
MARK = re.compile(f"([{OPEN}{CLOSE}])([0-9]+){NUMBER_END}")
THINK, END_THINK = "<think>", "</think>"
CALLS = ("tool_calls", "function_call")
CALL_LABELS = frozenset({"id", "type", "index"})

Span = tuple[int, int]
Change = Callable[[str, bool], str]


@dataclass(frozen=True)
class Found:
    """What a rendering holds of a chat's messages."""

    where: dict[int, Span] = field(default_factory=dict)
    """By message, from where its first text begins to where its last ends; empty if texts could but be searched for."""
    thoughtless: list[int] = field(default_factory=list)
    """The message of each thought that the template left out, as templates do with those of earlier turns."""


def find_texts(template: Template, chat: Chat, text: str) -> Found:
    """The texts of ``chat``'s messages in ``text``, its rendering.

    Raises DataError: a text is not there, or not in the order of the messages (a system prompt: anywhere; some
    templates put it in front of the last question), or a tool's name is not.  Thoughts may be missing.
    """
    for tool in chat.tools or []:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            remedy = "Set data.tools: none, or take another template"
            raise DataError(f"the chat template drops the tool {name!r}. {remedy}")
    return _by_marks(template, chat, text) or _by_search(chat, text)


def _by_marks(template: Template, chat: Chat, text: str) -> Found | None:
    """None: marks change what the template writes around them, or the texts have such characters themselves."""
    if NONCHARACTERS.search(text):
        return None
    texts: list[tuple[int, str, bool]] = []
    messages = [with_texts(message, _encloser(i, texts)) for i, message in enumerate(chat.messages)]
    try:
        marked, _ = template.render(messages, chat.tools)
    except Exception:  # a template may raise anything at marks that it does not expect
        return None
    parts = MARK.split(marked)
    if "".join(parts[::3]) != text:
        return None
    spans: dict[int, Span] = {}
    at = len(parts[0])
    for number, plain in zip(map(int, parts[2::3]), parts[3::3], strict=True):
        begin, end = spans.get(number, (at, at))
        spans[number] = (min(begin, at), max(end, at))
        at += len(plain)
    return _by_message(chat, texts, spans)


def _encloser(message: int, texts: list[tuple[int, str, bool]]) -> Change:
    """Puts marks around texts, inside the blanks that templates strip, and writes down which text has which number."""

    def enclosed(text: str, is_thought: bool) -> str:
        core = text.strip()
        if not core:
            return text
        at, number = text.index(core), len(texts)
        texts.append((message, core, is_thought))
        opened, closed = f"{OPEN}{number}{NUMBER_END}", f"{CLOSE}{number}{NUMBER_END}"
        return f"{text[:at]}{opened}{core}{closed}{text[at + len(core) :]}"

    return enclosed


def _by_message(chat: Chat, texts: list[tuple[int, str, bool]], spans: Mapping[int, Span]) -> Found:
    found = Found()
    for number, (message, core, is_thought) in enumerate(texts):
        if number in spans:
            (begin, end), (first, last) = spans[number], found.where.get(message, spans[number])
            found.where[message] = (min(begin, first), max(end, last))
        elif is_thought:
            found.thoughtless.append(message)
        else:
            raise _is_dropped(chat, message, core)
    begins = [(found.where[i][0], i) for i in sorted(found.where) if chat.messages[i]["role"] != "system"]
    for (earlier, _), (begin, message) in itertools.pairwise(begins):
        if begin < earlier:
            raise _is_dropped(chat, message, next(core for i, core, _ in texts if i == message))
    return found


def _by_search(chat: Chat, text: str) -> Found:
    found, at = Found(), 0
    for number, message in enumerate(chat.messages):
        start, ends, thinking = 0 if message["role"] == "system" else at, [at], []
        for core, is_thought in _cores(message):
            if is_thought:
                thinking.append(core)
                continue
            begin, end = _find(text, core, start)
            if begin < 0:
                raise _is_dropped(chat, number, core)
            ends.append(end)
        if message["role"] != "system":
            at = max(ends)
        # In front of what is said, or nowhere: elsewhere it would be another message's.
        missing = [core for core in thinking if not 0 <= _find(text, core, start)[0] < max(at, start + 1)]
        found.thoughtless.extend([number] * len(missing))
    return found


def _cores(message: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Texts without the blanks around them; are they thoughts?"""
    found: list[tuple[str, bool]] = []

    def kept(text: str, is_thought: bool) -> str:
        found.append((text.strip(), is_thought))
        return text

    with_texts(message, kept)
    return [(core, is_thought) for core, is_thought in found if core]


def _find(text: str, wanted: str, start: int) -> Span:
    """The first place of a text as it is or as JSON has it; (-1, -1)."""
    forms = {wanted, json_text.encode(wanted)[1:-1], json_text.encode(wanted, ensure_ascii=True)[1:-1]}
    found = [(begin, begin + len(form)) for form in forms if (begin := text.find(form, start)) >= 0]
    return min(found, default=(-1, -1))


def _is_dropped(chat: Chat, number: int, wanted: str) -> DataError:
    what = f"message {number + 1} has the role {chat.messages[number]['role']!r}, whose text {wanted!r:.60}"
    remedy = "Use a role that the template knows, or take a template that renders this message"
    return DataError(f"{what} the chat template drops or changes. {remedy}")


def with_texts(message: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """A copy of a message with each of its texts changed: by itself, and whether it is a thought.

    Texts are thoughts, what is said around them, names and arguments of calls.  Of the rest a template may read what
    it does not write.
    """

    def deep(value: Any, labels: frozenset[str] = frozenset()) -> Any:
        if isinstance(value, str):
            return change(value, False)
        if isinstance(value, Mapping):
            return {key: inner if key in labels else deep(inner) for key, inner in value.items()}
        return [deep(inner, labels) for inner in value] if isinstance(value, list | tuple) else value

    changed = dict(message)
    for key, value in message.items():
        if key in REASONING and isinstance(value, str):
            changed[key] = change(value, True)
        elif key == "content" and message["role"] == "assistant":
            changed[key] = "".join(_with_thoughts(value, change))
        elif key in ("content", *CALLS):
            changed[key] = deep(value, CALL_LABELS)
    return changed


def _with_thoughts(content: str, change: Change) -> Iterator[str]:
    """An answer's pieces; some data leave the thoughts' beginning out, none their end."""
    at = 0
    while (end := content.find(END_THINK, at)) >= 0:
        opened = content.rfind(THINK, at, end)
        begin = at if opened < 0 else opened + len(THINK)
        before = content[at:begin].removesuffix(THINK)
        yield change(before, False) + content[at + len(before) : begin]
        yield change(content[begin:end], True) + END_THINK
        at = end + len(END_THINK)
    yield change(content[at:], False)
