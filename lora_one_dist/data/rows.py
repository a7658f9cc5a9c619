"""Rows as they come: files or a named data set, and where in them a row is that does not fit.

In: paths or a name.  Out: a data set of `datasets`; for errors, the file and line.  Runs on any rank, not collective.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one_dist.config.settings import DATA_SUFFIXES

if TYPE_CHECKING:
    from datasets import Dataset


class DataError(ValueError):
    """Bad data: where (file and line, or row) and value, rule, remedy."""


class RowError(DataError):
    """A row that does not fit, by its number: whoever knows where the rows come from names the place."""

    def __init__(self, row: int, problem: str):
        super().__init__(f"row {row} (the first is 0): {problem}")
        self.row, self.problem = row, problem


def load_rows(source: str | list[str], split: str, max_samples: int | None) -> Dataset:
    """Read files (all with the same columns, concatenated) or the split of a named data set or folder.

    Raises DataError: a file or data set cannot be read or is empty, or files differ in their columns.
    """
    import datasets

    sources = [source] if isinstance(source, str) else source
    if len(sources) > 1 or Path(sources[0]).suffix in DATA_SUFFIXES:
        parts = [_load_file(path) for path in sources]
        for path, part in zip(sources, parts, strict=True):
            if part.features != parts[0].features:
                found = f"{path}: has columns {dict(part.features)}, {sources[0]} has {dict(parts[0].features)}"
                raise DataError(f"{found}. Names and types must be the same in all. Write them with the same tool.")
        rows = datasets.concatenate_datasets(parts)
    else:
        try:
            rows = datasets.load_dataset(sources[0], split=split)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            remedy = f"Check name, split and network, or give files ending in {', '.join(DATA_SUFFIXES)}"
            raise DataError(f"{sources[0]}, split {split}: cannot be loaded: {root_cause(error)}. {remedy}.") from error
    return rows if max_samples is None else rows.select(range(min(max_samples, len(rows))))


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
            count = len(_load_file(path))
            if left < count:
                lines = _row_lines(path) if Path(path).suffix in (".jsonl", ".json") else []
                return f"{path}, line {lines[left]}" if len(lines) == count else f"{path}, record {left + 1}"
            left -= count
    except (DataError, OSError):
        pass
    return unknown


def _row_lines(path: str) -> list[int]:
    """Numbers of the lines that hold something; none if the file is one JSON array."""
    held = [(number, line.lstrip()[:1]) for number, line in enumerate(_lines(path), start=1) if line.strip()]
    return [] if held[0][1] == "[" else [number for number, _ in held]


@contextlib.contextmanager
def placing(source: str | list[str] | None) -> Iterator[None]:
    """An error about a row of ``source`` names the file and the line."""
    try:
        yield
    except RowError as error:
        if source is None:
            raise
        raise DataError(f"{place_of(source, error.row)}: {error.problem}") from error


def _load_file(path: str) -> Dataset:
    from datasets import Features, Json, Value, load_dataset

    kind = {".jsonl": "json"}.get(Path(path).suffix, Path(path).suffix[1:])
    options: dict[str, Any] = {}
    try:
        if not Path(path).is_file() or Path(path).suffix not in DATA_SUFFIXES:
            raise DataError(f"{path}: is not a file ending in {', '.join(DATA_SUFFIXES)}. Check the path.")
        if kind != "parquet" and _count_lines(path, kind) <= (kind == "csv"):  # its header
            raise DataError(f"{path}: holds no rows, must hold at least one. Check how the file was written.")
        if kind == "csv":  # as strings: pandas' own types make 007 a 7, and text such as NA or None a null
            strings = Features(dict.fromkeys(_csv_header(path), Value("string")))
            options = {"features": strings, "keep_default_na": False}
        elif kind == "json":
            options = {"parse_agent_traces": False}  # chats with columns id, source, model look like traces of agents
        rows = load_dataset(kind, data_files=path, split="train", **options)
        dates = {name: Json() for name, feature in rows.features.items() if "timestamp" in str(feature)}
        if kind == "json" and dates:  # pyarrow's guess for columns of nothing but ISO dates; Json keeps the text
            options["features"] = Features({**rows.features, **dates})
            rows = load_dataset(kind, data_files=path, split="train", **options)
        return rows
    except DataError:
        raise
    except Exception as error:  # each reader has its own kinds
        where = _find_bad_json(path) if kind == "json" else path
        raise DataError(f"{where}: cannot be read as {kind} ({root_cause(error)}). Mend or remove it.") from error


def _count_lines(path: str, kind: str) -> int:
    """Lines that hold something.  Raises DataError for a null in place of an object, which crashes pyarrow."""
    first, count = "", 0
    for number, line in enumerate(_lines(path), start=1):
        text = line.strip()
        first, count = first or text[:1], count + bool(text)
        # It ends the process with a segmentation fault (apache/arrow#47409, seen with pyarrow 26).
        if kind == "json" and first != "[" and text.startswith("null"):
            raise DataError(f"{path}, line {number}: must be an object, is {text:.20}. Mend or remove it.")
    return count


def root_cause(error: BaseException) -> str:
    """The first line of the error at the root: `datasets` wraps it in ones that say only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _lines(path: str) -> Iterator[str]:
    """The lines of a text file.  `datasets` takes invalid UTF-8 in JSONL and fails only when the row is used."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {line[error.start]:#04x}"
                raise DataError(f"{path}, line {number}: {byte} is not UTF-8. Save the file as UTF-8.") from error
            yield text


def _csv_header(path: str) -> list[str]:
    """The columns of a CSV file whose records all have as many fields; pandas would fill or shift the others."""
    reader = csv.reader(_lines(path))
    header = next(reader)
    for record in reader:
        if len(record) not in (0, len(set(header))):  # 0: a blank line
            rule = f"must have one field for each of {header}, all distinct. Quote fields with commas or line breaks"
            raise DataError(f"{path}, line {reader.line_num}: {record} {rule}.")
    return header


def _find_bad_json(path: str) -> str:
    """'file, line: problem' for the first line at fault, or the file alone if none is found."""
    text = "".join(_lines(path))
    columns: set[str] = set()
    for number, line in enumerate([text] if text.lstrip().startswith("[") else text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"{path}, line {number + error.lineno - 1}: {error.msg}"
        except RecursionError:
            return f"{path}, line {number}: is nested too deep"
        if not isinstance(row, dict):
            return f"{path}, line {number}: must be an object, is a {type(row).__name__}"
        columns = columns or set(row)
        if not columns.issuperset(row):
            return f"{path}, line {number}: has columns {sorted(row)}, the first line has {sorted(columns)}"
    return path
