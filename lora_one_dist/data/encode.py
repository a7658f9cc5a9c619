"""Rows to token ids and to what carries a loss.

In: chunks of rows, a tokenizer, :class:`DataConfig`.  Out: tables of Arrow, a row for each row that came in.  A
function of its arguments alone: any process may do any chunk.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data import json_text
from lora_one_dist.data.batches import IGNORE_INDEX
from lora_one_dist.data.chat import render_chat
from lora_one_dist.data.errors import DataError, RowError
from lora_one_dist.data.messages import read_chat, read_tools
from lora_one_dist.data.rows import Chunk
from lora_one_dist.data.template import Template
from lora_one_dist.data.texts import Span

if TYPE_CHECKING:
    import pyarrow

CHARACTERS = 8  # a token: of a longer text the rest is tokenised only if this was not enough
FORMAT = json_text.Format()
# What a template may raise at a row, whose author may not be ours.
ROW_ERRORS = (TemplateError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
MARGIN = 8  # tokens at a cut that may be others in the whole text


@dataclass(frozen=True)
class Read:
    """A row as text."""

    text: str
    prompt: str | None = None
    """Format completion: where the loss begins, as generation sees it."""
    learned: Sequence[Span] | None = None
    """(begin, end) of the characters that carry a loss; None: all."""
    dropped_thoughts: int = 0
    control_tokens: bool = False
    """Does a user's text hold what the template writes itself?"""


class Encoder:
    """One way to make samples of rows.

    For a model ``with_encoder`` a prompt and its completion each get what the tokenizer puts around a text; a sample's
    input_ids are both, end to end, and its ``encoder_length`` says where the completion begins.

    Raises DataError: format chat, and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, date: datetime.date, with_encoder: bool = False):
        if config.format == "chat" and not tokenizer.chat_template:
            value = f"data.format = chat: the tokenizer {tokenizer.name_or_path} has no chat template, which it needs"
            raise DataError(f"{value}. Take the instruction-tuned model's tokenizer, or use data.format completion.")
        self.tokenizer, self.config, self.date, self.with_encoder = tokenizer, config, date, with_encoder
        self._templates: dict[bool, Template] = {}

    def __reduce__(self) -> tuple[type[Encoder], tuple[Any, ...]]:
        return Encoder, (self.tokenizer, self.config, self.date, self.with_encoder)  # compiled templates cannot travel

    def encode(self, chunk: Chunk) -> pyarrow.Table:
        """A table of the chunk's samples: input_ids, labels, and counts.  Raises RowError."""
        import pyarrow

        nulls, reads = [], []
        for number, row, dropped in chunk.rows():
            nulls.append(dropped)
            reads.append(self.read(row, number))
        samples = self._samples(reads)
        columns = {name: _lists([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
        counts = {
            name: [int(sample[name]) for sample in samples] for name in ("prompt_length", "num_targets", "is_cut")
        }
        counts |= {
            "added_nulls": nulls,
            "dropped_thoughts": [read.dropped_thoughts for read in reads],
            "control_tokens": [int(read.control_tokens) for read in reads],
        }
        if self.with_encoder:
            counts["encoder_length"] = counts["prompt_length"]
        return pyarrow.table(columns | {name: pyarrow.array(held, pyarrow.int64()) for name, held in counts.items()})

    def read(self, row: Mapping[str, Any], number: int) -> Read:
        """A row's text and what of it is learned.  Raises RowError."""
        config = self.config
        try:
            absent = [name for name in self.columns if row.get(name) is None]
            if absent:
                raise DataError(f"columns {absent} are null or missing. Fill them, or take the row out")
            if config.format == "completion":
                prompt, completion = (FORMAT.format(form, **row) for form in (config.prompt, config.completion))
                return Read(prompt + completion, prompt)
            if config.format == "chat":
                return self._read_chat(row)
            if not isinstance(row[config.text], str):
                raise DataError(f"{config.text} = {row[config.text]!r:.80}: must be a string. Mend the row")
            return Read(row[config.text])
        except ROW_ERRORS as error:
            remedy = "" if isinstance(error, DataError) else ": the template cannot take the row. Mend one of them"
            raise RowError(number, f"{error}{remedy}.") from error

    @functools.cached_property
    def columns(self) -> list[str]:
        """Those that the format cannot do without."""
        config = self.config
        return {"completion": config.template_columns, "chat": [], "text": [config.text]}[config.format]

    def _read_chat(self, row: Mapping[str, Any]) -> Read:
        config = self.config
        column = chat_column(row, config)
        if row.get(column) is None:
            raise DataError(f"columns {[column]} are null or missing. Fill them, or take the row out")
        tools = read_tools(self._tools(row))
        template = self._template(bool(tools))
        chat = read_chat(_with_system(row, column), tools, column, template)
        rendered = render_chat(template, chat, config.loss_on)
        if rendered.learned and template.marks_generation:
            self._refuse_open_end(rendered.text, rendered.learned)
        said = [m["content"] for m in chat.messages if m["role"] != "assistant" and m.get("content")]
        control = any(self._control.search(text) for text in said)
        return Read(rendered.text, None, rendered.learned, rendered.dropped_thoughts, control)

    def _tools(self, row: Mapping[str, Any]) -> Any:
        """As the row holds them; of the older kind, `functions`, as tools."""
        if self.config.tools == "none":
            return None
        if self.config.tools != "auto":
            return row.get(self.config.tools)
        functions = row.get("functions")
        if row.get("tools") is not None or not isinstance(functions, list):
            return row.get("tools")
        return [{"type": "function", "function": function} for function in functions]

    def _template(self, tools: bool) -> Template:
        """For chats with or without tools: a tokenizer may have two."""
        if tools not in self._templates:
            source = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
            self._templates[tools] = Template(source, self.tokenizer.special_tokens_map, self.date)
        return self._templates[tools]

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds special tokens in a text."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, filter(None, names))) or "(?!)")

    @functools.cached_property
    def _control_next(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self._control.pattern})")

    @functools.cached_property
    def _swallowing(self) -> dict[int, str]:
        """Special tokens that take the blanks behind them, by id."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.rstrip}

    def _refuse_open_end(self, text: str, learned: Sequence[Span]) -> None:
        """A model that never learns a turn's end never stops."""
        for begin, end in learned:
            ended = [found.end() for found in self._control.finditer(text, begin, end)]
            follows = self._control_next.match(text, end)
            if follows and (not ended or text[ended[-1] : end].strip()):
                rule = f"the chat template's generation block ends before the turn's end token {follows[1]}"
                raise DataError(f"{rule}, so the model would not learn to stop. Move endgeneration behind it")

    def _samples(self, reads: Sequence[Read]) -> list[dict[str, Any]]:
        """Ids and labels of texts, all tokenised at once."""
        if self.with_encoder:
            return [self._sample([*prompt, *completion], len(prompt)) for prompt, completion in self._pairs(reads)]
        special = self.config.format != "chat"  # a chat's special tokens are all in its template
        if self.config.format == "completion" and self.config.loss_on == "completion":
            ids = self.ids([text for read in reads for text in (read.text, read.prompt or "")], special)
            # The prompt by itself, as generation sees it: its last token may be another in the whole.
            pairs = zip(ids[::2], ids[1::2], strict=True)
            return [self._sample(whole, _common_prefix(prompt, whole)) for whole, prompt in pairs]
        if self.config.format != "chat" or not self.tokenizer.is_fast:
            texts = self.ids([read.text for read in reads], special)
            return [
                self._sample(whole, *self._borders_of_beginnings(read, whole))
                for read, whole in zip(reads, texts, strict=True)
            ]
        return [
            self._sample(ids, *_borders(read.learned, ends), is_cut=is_cut)
            for read, (ids, ends, is_cut) in zip(reads, self._ids_and_ends([r.text for r in reads]), strict=True)
        ]

    def _pairs(self, reads: Sequence[Read]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of prompts and of completions; tokenizers of translators put other tokens around the latter."""
        prompts = [read.prompt or "" for read in reads]
        completions = [read.text.removeprefix(prompt) for read, prompt in zip(reads, prompts, strict=True)]
        options = {"return_attention_mask": False, "verbose": False}
        written = self.tokenizer(text_target=completions, **options)["input_ids"] if reads else []
        for prompt, completion in zip(self.ids(prompts, True), written, strict=True):
            yield self.read_by_encoder(prompt), completion

    def read_by_encoder(self, prompt: list[int]) -> list[int]:
        """Ids of a prompt; of an empty one, where the tokenizer adds nothing, the end: an encoder needs one to read."""
        return prompt or [self.tokenizer.eos_token_id]

    def ids(self, texts: list[str], special: bool) -> list[list[int]]:
        """Token ids of texts, with or without the tokens that the tokenizer puts around a text."""
        options = {"return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=special, **options)["input_ids"] if texts else []

    def _ids_and_ends(self, texts: list[str]) -> list[tuple[list[int], np.ndarray, bool]]:
        """Ids, where in its text each token ends, and whether something is missing behind ``max_length``."""
        heads = [self._head(text) for text in texts]
        found = self._tokenised(heads)
        short = [
            i
            for i, (ids, _) in enumerate(found)
            if len(heads[i]) < len(texts[i]) and len(ids) <= self.config.max_length + MARGIN
        ]
        for i, whole in zip(short, self._tokenised([texts[i] for i in short]), strict=True):
            found[i] = whole
        return [(ids, ends, len(ids) > self.config.max_length) for ids, ends in found]

    def _tokenised(self, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found = self.tokenizer(texts, return_offsets_mapping=True, **options)
        return [
            (ids, np.maximum.accumulate([0, *self._ends(text, ids, offsets)])[1:])
            for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
        ]

    def _ends(self, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
        """Where tokens end, without the blanks that some special tokens take from what follows."""
        ends = [end for _, end in offsets]
        if self._swallowing:
            for k, (i, (begin, end)) in enumerate(zip(ids, offsets, strict=True)):
                content = self._swallowing.get(i)
                if content and (at := text.find(content, begin, end)) >= 0:
                    ends[k] = at + len(content)
        return ends

    def _head(self, text: str) -> str:
        """What ``max_length`` needs of a text, up to a special token: those before it do not depend on the rest."""
        enough = CHARACTERS * (self.config.max_length + MARGIN)
        found = self._control.search(text, enough) if len(text) > enough else None
        return text if found is None else text[: found.start()]

    def _borders_of_beginnings(self, read: Read, ids: Sequence[int]) -> list[int]:
        """Of a tokenizer that does not say where in the text its tokens are."""
        if read.learned is None:
            return [0]
        beginnings = [read.text[:border] for span in read.learned for border in span]
        return [_common_prefix(beginning, ids) for beginning in self.ids(beginnings, False)] or [len(ids)]

    def _sample(self, ids: list[int], *borders: int, is_cut: bool | None = None) -> dict[str, Any]:
        """One sample: loss from the first of ``borders`` to the second, from the third to the fourth, ..."""
        eos, limit = self.tokenizer.eos_token_id, self.config.max_length
        ends = ids[borders[0] :][-2:] if self.with_encoder else ids[-1:]  # MBart puts a language behind the end
        if self.config.format != "chat" and eos is not None and eos not in ends:
            ids = [*ids, eos]
        held = np.array(ids[:limit], dtype=np.int32)
        labels = np.full_like(held, IGNORE_INDEX)
        for start, stop in zip(borders[::2], [*borders[1::2], len(ids)], strict=False):
            labels[start:stop] = held[start:stop]
        return {
            "input_ids": held,
            "labels": labels,
            "prompt_length": min([*borders[:1], len(held)]),
            "num_targets": np.count_nonzero(labels[1:] != IGNORE_INDEX),
            "is_cut": len(ids) > limit if is_cut is None else is_cut,
        }


def _lists(rows: Sequence[np.ndarray]) -> pyarrow.Array:
    """Arrays of one dimension as a column of lists."""
    import pyarrow

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(offsets, np.concatenate(rows))


def _with_system(row: Mapping[str, Any], column: str) -> Any:
    """A row's messages, with the system prompt that ShareGPT rows have in a column of its own."""
    messages, system = row[column], row.get("system")
    if column != "conversations" or not isinstance(messages, list) or not isinstance(system, str) or not system:
        return messages
    return [{"role": "system", "content": system}, *messages]


def chat_column(row: Mapping[str, Any], config: DataConfig) -> str:
    """Where a row has its messages: as configured, or where ShareGPT has them."""
    named = config.messages
    return "conversations" if named == "messages" and named not in row and "conversations" in row else named


def _borders(learned: Sequence[Span] | None, ends: np.ndarray) -> list[int]:
    """Tokens between which the loss is: a token belongs to the span in which it ends."""
    if learned is None:
        return [0]
    flat = [border for span in learned for border in span]
    return np.searchsorted(ends, flat, side="right").tolist() or [len(ends)]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
