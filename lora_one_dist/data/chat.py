"""A chat to its text and to the characters of it that are learned: those that a model would have to generate.

In: a :class:`Chat` and its template.  Out: :class:`Rendered`.  A turn begins where the beginning of the chat with a
generation prompt ends, and ends where the beginning with the turn ends; both must begin the whole.  Of a chat of many
turns not each beginning is rendered, which is quadratic: what stands between two messages' texts is cut as it was the
first time that it stood there.  A function of its arguments alone: no chat changes what is learned of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_one_dist.data.errors import DataError
from lora_one_dist.data.messages import Chat
from lora_one_dist.data.template import Template
from lora_one_dist.data.texts import Span, find_texts

FEW = 8  # turns of which each beginning is rendered


@dataclass(frozen=True)
class Rendered:
    """A chat as the model reads it."""

    text: str
    learned: list[Span] | None
    """(begin, end) of the characters that carry a loss, ascending; None: all of them."""
    dropped_thoughts: int
    """Thoughts that the template left out, as templates do with those of earlier turns."""


def render_chat(template: Template, chat: Chat, loss_on: str) -> Rendered:
    """The text of a chat and what is learned of it.

    Raises:
        DataError: what is learned begins the chat; the template drops a text of a message, or rewrites turns that are
            learned.
    """
    text, generated = template.render(chat.messages, chat.tools)
    found = find_texts(template, chat, text)
    turns = _Turns(template, chat, text, loss_on, generated, found.where)
    answers = chat.answers()
    wanted = [i for i in answers if chat.weights[i]]
    if loss_on == "last":
        wanted = [i for i in wanted if i > chat.last_question]
    if loss_on == "all":
        return Rendered(text, _all_but_unwanted(turns, [i for i in answers if i not in wanted]), len(found.thoughtless))
    if 0 in wanted:
        raise DataError("starts with an assistant turn, which nothing asks for. Drop it or set data.loss_on: all")
    for i in sorted({*wanted} & {*found.thoughtless}):
        turns.span(i)  # of earlier turns it says so
        rule = f"message {i + 1} has thoughts that the chat template drops, so they would not be learned"
        raise DataError(f"{rule}. Take a chat_template that keeps them, or set data.loss_on: all")
    return Rendered(text, turns.spans(wanted), len(found.thoughtless))


def _all_but_unwanted(turns: _Turns, unwanted: list[int]) -> list[Span] | None:
    """Every character but those of turns of weight 0."""
    weights, answers = turns.chat.weights, turns.chat.answers()
    if others := [i for i, weight in enumerate(weights) if not weight and i not in answers]:
        rule = f"message {others[0] + 1} has a weight of 0, which data.loss_on: all can honour of assistants alone"
        raise DataError(f"{rule}. Take the weight out, or set data.loss_on: completion")
    if not unwanted:
        return None
    borders = [0, *(border for span in turns.spans(unwanted) for border in span), len(turns.text)]
    return [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]


@dataclass(frozen=True)
class _Turns:
    """Where in its text the turns of one chat begin and end."""

    template: Template
    chat: Chat
    text: str
    loss_on: str
    generated: list[Span]
    """Of the template's own ``{% generation %}`` blocks."""
    where: Mapping[int, Span]
    """Of the texts of each message, where they are known."""

    def spans(self, wanted: list[int]) -> list[Span]:
        if not wanted:
            return []
        if self.template.marks_generation:
            return self._chosen(wanted)
        spans = self._by_gaps(wanted) if len(wanted) > FEW else None
        return [self.span(i) for i in wanted] if spans is None else spans

    def span(self, i: int) -> Span:
        """Of the turn of message ``i``, by two beginnings.  Raises DataError: they do not begin the whole."""
        return self._begin(i), self._end(i)

    def _begin(self, i: int) -> int:
        if i == 0:
            return 0
        beginning, _ = self.template.render(self.chat.messages[:i], self.chat.tools, add_generation_prompt=True)
        if not self.text.startswith(beginning):
            self._end(i - 1)  # rewritten?
            rule = "the chat template's generation prompt is not how the turn begins in the chat's text"
            value = f"message {i + 1}: {rule}, so what is learnt is not what is generated"
            raise DataError(f"{value}. Take a chat_template that has both alike{self._or_all}")
        return len(beginning)

    def _end(self, i: int) -> int:
        if i == len(self.chat.messages) - 1:
            return len(self.text)
        beginning, _ = self.template.render(self.chat.messages[: i + 1], self.chat.tools)
        if not self.text.startswith(beginning):
            value = "the chat template rewrites earlier turns, so what is learnt is not what is generated"
            remedy = "Set data.loss_on: last or all, or take" if self.loss_on == "completion" else "Take"
            leaves = f"{remedy} a chat_template that leaves them as they were"
            raise DataError(f"{value}. {leaves}{self._or_all if self.loss_on == 'last' else ''}")
        return len(beginning)

    @property
    def _or_all(self) -> str:
        return "" if self.loss_on == "all" else ", or set data.loss_on: all"

    def _by_gaps(self, wanted: list[int]) -> list[Span] | None:
        """Linear: beginnings are rendered where a gap between messages is new, and at the last turn, the one half way
        to it, and so on; None if one of those is elsewhere than its gap says."""
        known: dict[Any, int] = {}

        def cut(kind: str, i: int, exact: Callable[[], int]) -> int:
            """Between messages ``i`` and ``i + 1``."""
            if not {i, i + 1} <= self.where.keys() or self.where[i][1] > self.where[i + 1][0]:
                return exact()
            first, last = self.where[i][1], self.where[i + 1][0]
            key = (kind, self._seen(i), self._seen(i + 1), self.text[first:last])
            if key not in known:
                known[key] = exact() - first
            return first + known[key]

        spans = [
            (cut("begin", i - 1, lambda i=i: self._begin(i)), cut("end", i, lambda i=i: self._end(i)))  # type: ignore[misc]
            for i in wanted
        ]
        tried = len(wanted) - 1
        while tried > 0:
            if self.span(wanted[tried]) != spans[tried]:
                return None
            tried //= 2
        return spans

    def _seen(self, i: int) -> tuple[Any, ...]:
        """What a template may look at when it writes what stands beside a message's texts."""
        message = self.chat.messages[i]
        content = message.get("content") or ""
        literals = frozenset(literal for literal in self.template.literals if literal in content)
        core = content.strip()
        blanks = content.partition(core)[::2] if core else content
        return message["role"], frozenset(message), i == 0, i > self.chat.last_question, literals, blanks

    def _chosen(self, wanted: Sequence[int]) -> list[Span]:
        """Those of the template's own blocks that belong to the wanted turns."""
        answers, blocks = self.chat.answers(), self.generated
        if list(wanted) == answers:
            return blocks
        if len(blocks) != len(answers):
            rule = f"the template has {len(blocks)} generation blocks for {len(answers)} assistant turns"
            raise DataError(f"{rule}, so some cannot be left out. Set data.loss_on: completion and weights of 1")
        kept = {*wanted}
        return [span for span, i in zip(blocks, answers, strict=True) if i in kept]
