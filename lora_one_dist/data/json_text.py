"""JSON as a person wrote it: numbers keep their text, and every row of a file its place.

In: .jsonl, or .json with one array of rows.  Out: values in which a number prints as it was written, and
:class:`JsonFile`, rows by number without a copy of the file.  Nothing is typed, so no row changes another.
"""

from __future__ import annotations

import json
import mmap
import re
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

BLANK = b" \t\r\n"
SCANNED = 2**26  # bytes looked through at once
_NUMBER_MARK = secrets.token_hex(16)  # no text of a user looks like a marked number
_MARKED_NUMBER = re.compile(f'"{_NUMBER_MARK}([^"]*)"')


class KeptNumber(float):
    """A number whose text is not the one that Python would print: 1.10, 1e3, -0, 0.30000000000000000001."""

    def __new__(cls, text: str) -> KeptNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    def __format__(self, form: str) -> str:
        return format(float(self), form) if form else self.text

    def __reduce__(self) -> tuple[type[KeptNumber], tuple[str]]:
        return KeptNumber, (self.text,)


def _real(text: str) -> float:
    value = float(text)
    return value if repr(value) == text else KeptNumber(text)


def _integer(text: str) -> int | float:
    return KeptNumber(text) if text == "-0" or len(text) > 4000 else int(text)  # longer ones Python does not print


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_real, parse_int=_integer, parse_constant=_refuse_constant
)


def decode(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError: it is none (json.JSONDecodeError, with its place), is nested too deep, or holds half of a
    surrogate pair, which is no character.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    if "\\u" in text:
        _refuse_half_characters(value)
    return value


def _refuse_half_characters(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"\\u{ord(value[error.start]):04x} is half of a character") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_half_characters(key)
            _refuse_half_characters(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_half_characters(inner)


def encode(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON text of a value, numbers by their text; the arguments are those of json.dumps that templates may give."""
    text = json.dumps(
        _with_marked_numbers(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return _MARKED_NUMBER.sub(r"\1", text)


class Format(string.Formatter):
    """As str.format, but JSON's other values as JSON: true, not True, where no form is asked for."""

    def format_field(self, value: Any, form: str) -> str:
        if not form and isinstance(value, bool | dict | list):
            return encode(value)
        return super().format_field(value, form)


def _with_marked_numbers(value: Any) -> Any:
    if isinstance(value, KeptNumber):
        return f"{_NUMBER_MARK}{value}"
    if isinstance(value, Mapping):
        return {key: _with_marked_numbers(inner) for key, inner in value.items()}
    return [_with_marked_numbers(inner) for inner in value] if isinstance(value, list | tuple) else value


class JsonFile:
    """The rows of a file, as the bytes of their text.  Raises ValueError for a .json file that is a broken array."""

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb") as file:
            empty = file.seek(0, 2) == 0
            self.bytes: Any = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.first = 3 if self.bytes[:3] == b"\xef\xbb\xbf" else 0  # a byte-order mark
        self.is_array = Path(path).suffix == ".json" and self._first_character() == b"["
        self.starts, self.ends = _elements(self.bytes, self.first) if self.is_array else _lines(self.bytes, self.first)

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, row: int) -> bytes:
        """Of row ``row``, from 0."""
        return self.bytes[self.starts[row] : self.ends[row]]

    def place(self, row: int) -> str:
        """'file, line N' of a JSONL row, 'file, record N' of an array's; both from 1."""
        if self.is_array:
            return f"{self.path}, record {row + 1}"
        start, line = int(self.starts[row]), 1
        for at in range(0, start, SCANNED):
            line += self.bytes[at : min(at + SCANNED, start)].count(b"\n")
        return f"{self.path}, line {line}"

    def _first_character(self) -> bytes:
        at = self.first
        while self.bytes[at : at + 1] and self.bytes[at : at + 1] in BLANK:
            at += 1
        return self.bytes[at : at + 1]


def _lines(data: Any, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of the lines that hold something."""
    breaks = [np.arange(0)]
    for at in range(first, len(data), SCANNED):
        piece = np.frombuffer(data[at : at + SCANNED], dtype=np.uint8)
        breaks.append(np.flatnonzero(piece == ord("\n")) + at)
    ends = np.concatenate(breaks)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[first], ends[:-1] + 1])[: len(ends)]
    held = np.array([bool(data[a:b].strip(BLANK)) for a, b in zip(starts, ends, strict=True)], dtype=bool)
    return starts[held].astype(np.int64), ends[held].astype(np.int64)


def _elements(data: Any, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of the elements of an array, in bytes."""
    text = data[first:].decode("utf-8")
    found: list[tuple[int, int]] = []
    at, offset, counted = _skip(text, text.index("[") + 1), first, 0
    while text[at : at + 1] != "]" or found:
        try:
            _, end = _DECODER.raw_decode(text, at)
        except RecursionError:
            raise ValueError(f"record {len(found) + 1} is nested too deep") from None
        offset += len(text[counted:at].encode())
        counted, begin = end, offset
        offset += len(text[at:end].encode())
        found.append((begin, offset))
        at = _skip(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _skip(text, at + 1)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, at + 1)
    bounds = np.array(found, dtype=np.int64).reshape(-1, 2)
    return bounds[:, 0], bounds[:, 1]


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at
