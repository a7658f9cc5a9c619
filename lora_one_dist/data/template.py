"""A chat template as a function of messages, tools and a date: nothing else may change what it renders.

In: the template's text, as a tokenizer holds it.  Out: :class:`Template`, with the language that transformers gives
templates (its documentation of chat templates; a test holds the two against each other), but for the clock, which
stands still, and numbers, which keep their text.  Pure.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_one_dist.data import json_text

# Unicode's noncharacters, which no text holds: where a {% generation %} block begins and ends in what is rendered.
BEGIN, END = "\ufdd0", "\ufdd1"
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of one meaning; templates read the first or second


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: what the model writes, put between BEGIN and END."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class Template:
    """One template, compiled.  Raises jinja2.TemplateError if it cannot be."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], date: datetime.date):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = json_text.encode  # without Jinja's escapes for HTML, as transformers has it
        environment.globals["raise_exception"] = _raise_exception
        midnight = datetime.datetime.combine(date, datetime.time())
        environment.globals["strftime_now"] = lambda form: midnight.strftime(form)
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.compiled = environment.from_string(source)
        self._tree = environment.parse(source)

    def reads(self, name: str) -> bool:
        """Does the template use this name, for a variable, an attribute or a text?"""
        return name in self._names or name in self.literals

    @property
    def marks_generation(self) -> bool:
        """Does it say itself what the model writes?"""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @functools.cached_property
    def literals(self) -> list[str]:
        """The texts in its expressions, which it may look for in a content."""
        found = self._tree.find_all(jinja2.nodes.Const)
        return sorted({node.value for node in found if isinstance(node.value, str) and node.value.strip()})

    @functools.cached_property
    def _names(self) -> set[str]:
        variables = {node.name for node in self._tree.find_all(jinja2.nodes.Name)}
        return variables | {node.attr for node in self._tree.find_all(jinja2.nodes.Getattr)}

    @functools.cached_property
    def takes_text_arguments(self) -> bool:
        """Does it add a call's arguments to strings, so that they must be JSON text and not an object?"""
        arguments = {"key": "value"}
        as_object = self._with_call(arguments)
        if as_object is not None and str(arguments) not in as_object:
            return False
        return self._with_call(json_text.encode(arguments)) is not None

    def _with_call(self, arguments: Any) -> str | None:
        """A chat with a call; None: the template does not take it."""
        function = {"name": "name", "arguments": arguments}
        parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "key"}}}
        tool = {"type": "function", "function": {"name": "name", "description": "name", "parameters": parameters}}
        call = {"id": "call00000", "type": "function", "function": function}
        asked = {"role": "user", "content": "q"}
        try:
            return self.render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], [tool])[0]
        except Exception:  # it may raise anything at what it does not expect
            return None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and (begin, end) of the characters of each ``{% generation %}`` block.

        Raises what the template raises: jinja2.TemplateError, TypeError, ...
        """
        text = self.compiled.render(
            messages=[_with_reasoning(message) for message in messages],
            tools=tools or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )
        return (text, []) if BEGIN not in text else _unmarked(text)


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message's thoughts under both names that templates read."""
    thoughts = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """``text`` without BEGIN and END, and where they were."""
    spans, begin, plain = [], 0, ""
    for part in re.split(f"([{BEGIN}{END}])", text):
        if part == BEGIN:
            begin = len(plain)
        elif part == END:
            spans.append((begin, len(plain)))
        else:
            plain += part
    return plain, spans
