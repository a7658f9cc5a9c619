"""Rows as they come: files or a named data set, and where in them a row is that does not fit.

In: paths or a name.  Out: :class:`Rows`, mappings by number: of JSON text what a person wrote, of typed files (Parquet,
CSV, data sets) what they hold.  Runs on any rank, not collective.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one_dist.config.settings import DATA_SUFFIXES
from lora_one_dist.data import json_text
from lora_one_dist.data.errors import DataError, RowError
from lora_one_dist.data.json_text import JsonFile

if TYPE_CHECKING:
    from datasets import Dataset

JSON_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Chunk:
    """Some rows one after another, on their way to another process."""

    first: int
    """Number of the first among all."""
    held: Any
    """Their texts, or a table of Arrow."""
    features: Any = None
    """The table's types."""

    def rows(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        """Number, row, and nulls dropped that a typed file had added.  Raises RowError."""
        if self.features is None:
            for number, text in enumerate(self.held, start=self.first):
                yield number, json_row(text, number), 0
            return
        from datasets import Dataset, DatasetInfo

        for number, row in enumerate(Dataset(self.held, info=DatasetInfo(features=self.features)), start=self.first):
            cleaned, nulls = without_added_nulls(row, self.features)
            yield number, cleaned, nulls


class Rows:
    """Rows of one or several sources, the first ``limit`` of them."""

    def __init__(self, parts: Sequence[JsonFile | Dataset], limit: int | None = None):
        self.parts = parts
        self.ends = list(itertools.accumulate(len(part) for part in parts))
        self.count = min(self.ends[-1], self.ends[-1] if limit is None else limit)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for chunk in self.chunks(1000):
            yield from (row for _, row, _ in chunk.rows())

    def __getitem__(self, number: int) -> dict[str, Any]:
        return next(row for _, row, _ in self._chunk(number, number + 1).rows())

    def to_list(self) -> list[dict[str, Any]]:
        return list(self)

    @property
    def column_names(self) -> list[str]:
        """Of the first row."""
        return list(self[0])

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All rows in order, at most ``size`` at a time, each chunk from one source."""
        for begin, end in zip([0, *self.ends], self.ends, strict=False):
            for first in range(begin, min(end, self.count), size):
                yield self._chunk(first, min(first + size, end, self.count))

    def _chunk(self, first: int, stop: int) -> Chunk:
        part = next(i for i, end in enumerate(self.ends) if first < end)
        source, offset = self.parts[part], self.ends[part - 1] if part else 0
        if isinstance(source, JsonFile):
            return Chunk(first, [source.text(row - offset) for row in range(first, stop)])
        return Chunk(first, source.with_format("arrow")[first - offset : stop - offset], source.features)

    def key(self) -> list[Any]:
        """What tells these rows from others, without reading them: of files path, size and time of the last change."""
        return [self.count, *map(_key_of, self.parts)]


def _key_of(part: JsonFile | Dataset) -> list[Any]:
    if not isinstance(part, JsonFile):
        return [part._fingerprint, str(part.features)]
    found = Path(part.path).stat()
    return [str(Path(part.path).resolve()), found.st_size, found.st_mtime_ns]


def json_row(text: bytes, number: int) -> dict[str, Any]:
    """Row ``number`` of its JSON text.  Raises RowError."""
    try:
        row = json_text.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(number, f"byte {text[error.start]:#04x} is not UTF-8. Save the file as UTF-8.") from None
    except ValueError as error:
        problem = getattr(error, "msg", None) or str(error)
        raise RowError(number, f"{problem}: cannot be read as json. Mend or remove it.") from None
    if not isinstance(row, dict):
        kind = "null" if row is None else f"a {type(row).__name__}"
        raise RowError(number, f"must be an object, is {kind}. Mend or remove it.")
    return row


def without_added_nulls(value: Any, feature: Any) -> tuple[Any, int]:
    """A typed value without the nulls in its structs, and their number: Arrow gives each the keys of all.

    Of what keeps JSON text as it was (`datasets.Json`) nothing is dropped, nor of a row's columns themselves.
    """
    dropped = 0

    def cleaned(inner: Any, kind: Any, is_row: bool = False) -> Any:
        nonlocal dropped
        if isinstance(kind, dict) and isinstance(inner, dict):
            kept = {key: found for key, found in inner.items() if found is not None or is_row}
            dropped += len(inner) - len(kept)
            return {key: cleaned(found, kind.get(key)) for key, found in kept.items()}
        element = getattr(kind, "feature", kind[0] if isinstance(kind, list) else None)
        return (
            [cleaned(found, element) for found in inner] if isinstance(inner, list) and element is not None else inner
        )

    return cleaned(value, dict(feature), True), dropped


def load_rows(source: str | list[str], split: str, max_samples: int | None) -> Rows:
    """The rows of files, one after another, or of the split of a named data set or folder.

    Raises DataError: a file or data set cannot be read or is empty.  What a JSON text holds is read with its row.
    """
    import datasets

    sources = [source] if isinstance(source, str) else source
    if len(sources) > 1 or Path(sources[0]).suffix in DATA_SUFFIXES:
        return Rows([_load_file(path) for path in sources], max_samples)
    try:
        return Rows([datasets.load_dataset(sources[0], split=split)], max_samples)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        remedy = f"Check name, split and network, or give files ending in {', '.join(DATA_SUFFIXES)}"
        raise DataError(f"{sources[0]}, split {split}: cannot be loaded: {root_cause(error)}. {remedy}.") from error


def place_of(source: str | list[str], row: int) -> str:
    """Where row ``row`` (from 0) of `load_rows` of ``source`` is: 'file, line N', 'file, record N' (both from 1).

    Lines for JSONL; records for JSON arrays, CSV (its header is none) and Parquet.  Reads the files again: for errors.
    Rows of a data set, and of files that are no longer what they were, keep their number.
    """
    sources, left = [source] if isinstance(source, str) else source, row
    unknown = f"{', '.join(sources)}, row {row} (the first is 0)"
    if len(sources) == 1 and Path(sources[0]).suffix not in DATA_SUFFIXES:
        return unknown
    try:
        for path in sources:
            part = _load_file(path)
            if left < len(part):
                return part.place(left) if isinstance(part, JsonFile) else f"{path}, record {left + 1}"
            left -= len(part)
    except (DataError, OSError):
        pass
    return unknown


@contextlib.contextmanager
def placing(source: str | list[str] | None) -> Iterator[None]:
    """An error about a row of ``source`` names the file and the line."""
    try:
        yield
    except RowError as error:
        if source is None:
            raise
        raise DataError(f"{place_of(source, error.row)}: {error.problem}") from error


def _load_file(path: str) -> JsonFile | Dataset:
    suffix = Path(path).suffix
    if not Path(path).is_file() or suffix not in DATA_SUFFIXES:
        raise DataError(f"{path}: is not a file ending in {', '.join(DATA_SUFFIXES)}. Check the path.")
    part = _load_json(path) if suffix in JSON_SUFFIXES else _load_typed(path, suffix[1:])
    if not len(part):
        raise DataError(f"{path}: holds no rows, must hold at least one. Check how the file was written.")
    return part


def _load_json(path: str) -> JsonFile:
    try:
        return JsonFile(path)
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x}"
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: {byte} is not UTF-8. Save the file as UTF-8.") from error
    except ValueError as error:
        at = getattr(error, "lineno", None)
        where = path if at is None else f"{path}, line {at}"
        raise DataError(
            f"{where}: {getattr(error, 'msg', error)}: cannot be read as json. Mend or remove it."
        ) from error


def _load_typed(path: str, kind: str) -> Dataset:
    from datasets import Features, Value, load_dataset

    options: dict[str, Any] = {}
    try:
        if kind == "csv":  # as strings: pandas' own types make 007 a 7, and text such as NA or None a null
            strings = Features(dict.fromkeys(_csv_header(path), Value("string")))
            options = {"features": strings, "keep_default_na": False}
        return load_dataset(kind, data_files=path, split="train", **options)
    except DataError:
        raise
    except Exception as error:  # each reader has its own kinds
        raise DataError(f"{path}: cannot be read as {kind} ({root_cause(error)}). Mend or remove it.") from error


def root_cause(error: BaseException) -> str:
    """The first line of the error at the root: `datasets` wraps it in ones that say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _csv_header(path: str) -> list[str]:
    """The columns of a CSV file whose records all have as many fields; pandas would fill or shift the others."""
    csv.field_size_limit(sys.maxsize)  # a document is longer than the module's 128 kB
    reader = csv.reader(_csv_lines(path))
    header, count = next(reader, []), 0
    for record in reader:
        count += bool(record)
        if len(record) not in (0, len(set(header))):  # 0: a blank line
            rule = f"must have one field for each of {header}, all distinct. Quote fields with commas or line breaks"
            raise DataError(f"{path}, line {reader.line_num}: {record!s:.200} {rule}.")
    if not count:
        raise DataError(f"{path}: holds no rows, must hold at least one. Check how the file was written.")
    return header


def _csv_lines(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {line[error.start]:#04x}"
                raise DataError(f"{path}, line {number}: {byte} is not UTF-8. Save the file as UTF-8.") from error
