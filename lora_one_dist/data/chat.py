"""A chat to its text and to the characters of it that are learned: those that a model would have to generate.

In: a :class:`Chat` and its template.  Out: :class:`Rendered`.  A turn begins where the beginning of the chat with a
generation prompt ends, and ends where the beginning with the turn ends.  To render each beginning is quadratic, so the
chat is rendered once more with marks around its texts: what stands between two marked texts is cut where the
beginnings of the first chat with the same text between the same roles cut it.  Linear in the length of the chat.
Pure, but for what :class:`Turns` remembers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_one_dist.data.errors import DataError
from lora_one_dist.data.messages import END_THINK, REASONING, THINK, Chat, dropped_thoughts, thoughts
from lora_one_dist.data.template import BEGIN, Template

# Noncharacters again, around the number of the message whose text they enclose.
OPEN, CLOSE, NUMBER_END = "\ufdd2", "\ufdd3", "\ufdd4"
NONCHARACTERS = re.compile(f"[{BEGIN}-{NUMBER_END}]")
MARK = re.compile(f"([{OPEN}{CLOSE}])([0-9]+){NUMBER_END}")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A chat as the model reads it."""

    text: str
    learned: list[Span] | None
    """(begin, end) of the characters that carry a loss, ascending; None: all of them."""
    dropped_thoughts: int
    """Thoughts that the template left out, as templates do with those of earlier turns."""


class Turns:
    """Where the turns of a template's chats begin and end; made once for a template, used for many chats."""

    def __init__(self, template: Template):
        self.template = template
        # What stands between two messages of given roles, and how much of it the first message's turn takes.
        self.known_begins: dict[tuple[Any, ...], int] = {}
        self.known_ends: dict[tuple[Any, ...], list[str]] = {}

    def render(self, chat: Chat, loss_on: str) -> Rendered:
        """The text of a chat and what is learned of it.

        Raises:
            DataError: what learns begins the chat; the template drops a text of a message, or rewrites turns that are
                learned.
        """
        text, generated = self.template.render(chat.messages, chat.tools)
        dropped = dropped_thoughts(chat, text)
        answers = chat.answers()
        wanted = [i for i in answers if chat.weights[i]]
        if loss_on == "last":
            wanted = [i for i in wanted if i > chat.last_question]
        if loss_on == "all":
            return Rendered(text, self._all_but_unwanted(chat, text, generated, wanted), dropped)
        if 0 in wanted:
            raise DataError("starts with an assistant turn, which nothing asks for. Drop it or set data.loss_on: all")
        return Rendered(text, self._spans(chat, text, generated, wanted), dropped)

    def _all_but_unwanted(self, chat: Chat, text: str, generated: list[Span], wanted: list[int]) -> list[Span] | None:
        """Every character but those of turns of weight 0."""
        answers = chat.answers()
        if others := [i for i, weight in enumerate(chat.weights) if not weight and i not in answers]:
            rule = f"message {others[0] + 1} has a weight of 0, which data.loss_on: all can honour of assistants alone"
            raise DataError(f"{rule}. Take the weight out, or set data.loss_on: completion")
        unwanted = [i for i in answers if i not in wanted]
        if not unwanted:
            return None
        spans = self._spans(chat, text, generated, unwanted)
        borders = [0, *(border for span in spans for border in span), len(text)]
        return [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]

    def _spans(self, chat: Chat, text: str, generated: list[Span], wanted: list[int]) -> list[Span]:
        if not wanted:
            return []
        if self.template.marks_generation:
            return _chosen(chat, generated, wanted)
        marked = self._marked_spans(chat, text)
        return [self._span(chat, text, marked, i) for i in wanted]

    def _marked_spans(self, chat: Chat, text: str) -> dict[int, Span]:
        """By message, from where its first text begins to where its last ends; empty where marks change the text."""
        if NONCHARACTERS.search(text):
            return {}
        messages = [_marked(message, i) for i, message in enumerate(chat.messages)]
        try:
            found, _ = self.template.render(messages, chat.tools)
        except Exception:  # a template may raise anything at marks that it does not expect
            return {}
        spans: dict[int, Span] = {}
        parts = MARK.split(found)
        at = len(parts[0])
        for number, plain in zip(map(int, parts[2::3]), parts[3::3], strict=True):
            begin, end = spans.get(number, (at, at))
            spans[number] = (min(begin, at), max(end, at))
            at += len(plain)
        return spans if "".join(parts[::3]) == text else {}

    def _span(self, chat: Chat, text: str, marked: Mapping[int, Span], i: int) -> Span:
        """Of the turn of message ``i``."""
        messages, last = chat.messages, i == len(chat.messages) - 1
        # What else a template may look at: does a question follow, and are there tools?
        key = (i > chat.last_question, bool(chat.tools), messages[i - 1]["role"])
        before = (marked[i - 1][1], marked[i][0]) if i - 1 in marked and i in marked else (0, -1)
        after = (marked[i][1], marked[i + 1][0]) if i in marked and i + 1 in marked else (0, -1)
        begin = self._known_begin(key, text, before) if i > 0 else 0
        end = len(text) if last else self._known_end((*key, messages[i + 1]["role"]), text, after)
        if begin is None:
            begin = self._length(chat.messages[:i], chat, text, generation=True)
            if before[0] <= begin <= before[1]:
                self.known_begins[*key, text[before[0] : before[1]]] = begin - before[0]
        if end is None:
            end = self._length(chat.messages[: i + 1], chat, text, generation=False)
            if after[0] <= end <= after[1]:
                self.known_ends.setdefault((*key, messages[i + 1]["role"]), []).append(text[end : after[1]])
        return begin, end

    def _known_begin(self, key: tuple[Any, ...], text: str, before: Span) -> int | None:
        known = self.known_begins.get((*key, text[before[0] : before[1]])) if before[0] <= before[1] else None
        return None if known is None else before[0] + known

    def _known_end(self, key: tuple[Any, ...], text: str, after: Span) -> int | None:
        """The head of the next message is known; what of a call's arguments stands before it may be anything."""
        if after[0] > after[1]:
            return None
        between = text[after[0] : after[1]]
        return next((after[1] - len(h) for h in self.known_ends.get(key, []) if between.endswith(h)), None)

    def _length(self, messages: Sequence[Mapping[str, Any]], chat: Chat, text: str, generation: bool) -> int:
        """Of a beginning of the chat, rendered by itself."""
        beginning, _ = self.template.render(messages, chat.tools, add_generation_prompt=generation)
        if not text.startswith(beginning):
            value = "the chat template rewrites earlier turns, so what is learnt is not what is generated"
            remedy = "Set data.loss_on: last or all, or take a chat_template that leaves them as they were"
            raise DataError(f"{value}. {remedy}")
        return len(beginning)


def _chosen(chat: Chat, generated: list[Span], wanted: list[int]) -> list[Span]:
    """Those of the template's own blocks that belong to the wanted turns."""
    answers = chat.answers()
    if wanted == answers:
        return generated
    if len(generated) != len(answers):
        rule = f"the template has {len(generated)} generation blocks for {len(answers)} assistant turns"
        raise DataError(f"{rule}, so some cannot be left out. Set data.loss_on: completion and weights of 1")
    return [span for span, i in zip(generated, answers, strict=True) if i in wanted]


def _marked(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message with marks around its texts, inside the blanks that templates strip."""

    def enclosed(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        opened, closed = f"{OPEN}{number}{NUMBER_END}", f"{CLOSE}{number}{NUMBER_END}"
        return f"{text[:at]}{opened}{core}{closed}{text[at + len(core) :]}"

    marked = dict(message)
    for key in REASONING:
        if isinstance(message.get(key), str):
            marked[key] = enclosed(message[key])
    if isinstance(content := message.get("content"), str):
        marked["content"], at = "", 0
        for begin, end in thoughts(message):
            before = content[at:begin].removesuffix(THINK)
            opened = content[at + len(before) : begin]
            marked["content"] += enclosed(before) + opened + enclosed(content[begin:end]) + END_THINK
            at = end + len(END_THINK)
        marked["content"] += enclosed(content[at:])
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, enclosed) for call in calls]
    return marked


def _marked_call(call: Mapping[str, Any], enclosed: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _marked_call(call["function"], enclosed)}
    return {**call, "name": enclosed(call["name"])} if isinstance(call.get("name"), str) else dict(call)
