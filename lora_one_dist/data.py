"""Rows to tokens, and which sample goes into which micro-batch.

In: files or a data set, a tokenizer, :class:`DataConfig`.  Out: ids and labels in a memory-mapped Arrow file, which a
later process with the same inputs finds in the cache of `datasets`; batch indices as functions of (seed, step); padded
tensors.  Runs on any rank, not collective.  Peak memory: 1000 rows, and 48 bytes per sample of counts and orders.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lora_one_dist.config import DATA_SUFFIXES, DataConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index
# The settings that change a row's tokens; the others may change without making a cached result stale.
TOKEN_FIELDS = {"format", "prompt", "completion", "messages", "text", "loss_on", "max_length"}


class DataError(ValueError):
    """Bad data: where (file and line, or row) and value, rule, remedy."""


class _RowError(DataError):
    """A row that does not fit, by its number: whoever knows where the rows come from names the place."""

    def __init__(self, row: int, problem: str):
        super().__init__(f"row {row} (the first is 0): {problem}")
        self.row, self.problem = row, problem


@dataclass(frozen=True)
class TokenData:
    """Samples to train on, as many as ``len()``, and what became of the rows that came in."""

    dataset: Any  # rows by number: input_ids, labels (-100: no loss), prompt_length (ids before the first), num_targets
    num_rows: int  # that came in
    num_truncated: int  # of those, with or without targets
    num_without_targets: int  # dropped: no token of theirs carries a loss
    num_tokens: int  # in `dataset`
    num_targets: int  # in `dataset`: labels[1:] != -100, the tokens that are predicted
    rows: np.ndarray  # (len,) int64: the row that each sample was, counted before any was dropped; see `place_of`
    lengths: np.ndarray  # (len,) int64: tokens of each sample

    def __len__(self) -> int:
        return len(self.dataset)

    def rows_of(self, sample: int) -> list[int]:
        """The rows that are in a sample: one, or of a packed row those of its documents."""
        return [int(self.rows[sample])]

    def fingerprint(self) -> dict[str, Any]:
        """What tells one tokenised data set from another: number of samples, and SHA-256 of every id and label.

        Reads all of it once (about 1 s a gigabyte).  Not collective.
        """
        digest = hashlib.sha256()
        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            for name in ("input_ids", "labels"):
                for chunk in table.column(name).chunks:
                    digest.update(np.diff(chunk.offsets.to_numpy()).astype(np.int64).tobytes())
                    digest.update(chunk.flatten().to_numpy().astype(np.int32).tobytes())
        return {"samples": len(self), "sha256": digest.hexdigest()}


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
            raise DataError(f"{sources[0]}, split {split}: cannot be loaded: {_cause(error)}. {remedy}.") from error
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
def _placing(source: str | list[str] | None) -> Iterator[None]:
    """An error about a row of ``source`` names the file and the line."""
    try:
        yield
    except _RowError as error:
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
        raise DataError(f"{where}: cannot be read as {kind} ({_cause(error)}). Mend or remove it.") from error


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


def _cause(error: BaseException) -> str:
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


def tokenize(
    rows: Dataset,
    tokenizer: Tokenizer,
    config: DataConfig,
    source: str | list[str] | None = None,
    only: np.ndarray | None = None,
) -> TokenData:
    """Token ids and labels of every row, cut at ``config.max_length``; rows without a target are dropped and counted.

    ``source``: where `load_rows` read the rows, to name the place of a bad one.  ``only``: numbers of the rows to take,
    as if there were no others; all are tokenised, so that those held out find theirs in the cache.

    Raises DataError: no chat template for chats, a column missing or null, a row that does not fit the format, a
    template that rewrites earlier turns, or no row with a target.
    """
    from datasets import Features, List, Value

    if config.format == "chat" and not tokenizer.chat_template:
        value = f"data.format = chat: the tokenizer {tokenizer.name_or_path} has no chat template, which it needs"
        raise DataError(f"{value}. Take the instruction-tuned model's tokenizer, or use data.format completion.")
    columns = _columns(rows, config, source)
    settings = DataConfig(train="", **config.model_dump(include=TOKEN_FIELDS))
    # `datasets` hashes a module's function by its name only: without this an edit here would meet stale results.
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    counts = dict.fromkeys(("prompt_length", "num_targets", "uncut_length"), Value("int64"))
    with _placing(source):
        mapped = rows.select_columns(columns).map(
            _encode_rows,
            batched=True,
            with_indices=True,
            remove_columns=columns,
            features=Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), **counts}),
            fn_kwargs={"tokenizer": tokenizer, "config": settings, "code": code},
            desc="tokenize",
        )
    taken = np.arange(len(rows)) if only is None else only
    targets, lengths = (mapped.data.column(name).to_numpy()[taken] for name in ("num_targets", "uncut_length"))
    kept, truncated = targets > 0, lengths > config.max_length
    if not kept.any():
        value = f"data.max_length = {config.max_length}: cuts {truncated.sum()} of {len(taken)} rows"
        raise DataError(f"{value}, none has a token to learn. Raise it; a chat needs a message of role 'assistant'.")
    numbers, lengths = taken[kept].astype(np.int64), lengths[kept].clip(max=config.max_length)
    dataset = mapped.remove_columns("uncut_length")
    dataset = dataset if len(numbers) == len(rows) else dataset.select(numbers)
    cut, dropped = int(truncated.sum()), int((~kept).sum())
    return TokenData(dataset, len(taken), cut, dropped, int(lengths.sum()), int(targets.sum()), numbers, lengths)


def load_eval_prompts(
    rows: Dataset,
    tokenizer: Tokenizer,
    config: DataConfig,
    indices: Iterable[int],
    source: str | list[str] | None = None,
) -> list[tuple[list[int], str]]:
    """(ids of the prompt alone, as generation sees it, and text of the completion) of rows of format completion.

    Of a prompt of more than ``config.max_length`` tokens the last ones are kept.  Raises DataError as `tokenize`.
    """
    rows, prompts = rows.select_columns(_columns(rows, config, source)), []
    for index in indices:
        with _placing(source):
            whole, prompt = _texts(rows[index], index, tokenizer, config)
        ids, bare = (_ids(tokenizer, [prompt], special)[0] for special in (True, False))
        if ids[len(ids) - len(bare) :] != bare:
            ids = ids[:-1]  # a tokenizer that closes every text would end the answer before it starts
        prompts.append((ids[-config.max_length :], whole.removeprefix(prompt)))
    return prompts


def _columns(rows: Dataset, config: DataConfig, source: str | list[str] | None) -> list[str]:
    """The columns that the format reads, all of them present."""
    template = config.prompt + config.completion
    named = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name)
    columns = {"completion": list(named), "chat": [config.messages], "text": [config.text]}[config.format]
    if missing := [name for name in columns if name not in rows.column_names]:
        where = "the data" if source is None else source if isinstance(source, str) else source[0]
        value = f"data.format = {config.format}: reads columns {missing}, {where} has {rows.column_names}"
        raise DataError(f"{value}. Name its columns in data.prompt and data.completion, data.messages or data.text.")
    return columns


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _encode_rows(batch: Mapping[str, list], indices: list[int], tokenizer: Any, config: DataConfig, code: str) -> dict:
    """What `Dataset.map` calls: a function of its arguments alone (``code`` is there to be hashed)."""
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    texts = [_texts(row, index, tokenizer, config) for row, index in zip(rows, indices, strict=True)]
    # A chat's special tokens are all in its template.
    ids = iter(_ids(tokenizer, [text for row in texts for text in row], special=config.format != "chat"))
    samples = [_encode([next(ids) for _ in row], tokenizer.eos_token_id, config) for row in texts]
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _texts(row: Mapping[str, Any], index: int, tokenizer: Any, config: DataConfig) -> list[str]:
    """A row's text, then those beginnings of it that end where loss starts, stops, starts, ..."""
    from jinja2 import TemplateError

    try:
        if null := [name for name, value in row.items() if value is None]:
            raise DataError(f"columns {null} are null or missing. Fill them, or take the row out")
        if config.format == "completion":
            prompt = config.prompt.format(**row)
            return [prompt + config.completion.format(**row), prompt]
        if config.format == "chat":
            return _chat_texts(row[config.messages], tokenizer, config)
        if not isinstance(row[config.text], str):
            raise DataError(f"{config.text} = {row[config.text]!r:.80}: must be a string. Mend the row")
        return [row[config.text]]
    except (TemplateError, LookupError, ValueError, TypeError) as error:
        remedy = "" if isinstance(error, DataError) else ": the template cannot take the row. Mend one of them"
        raise _RowError(index, f"{error}{remedy}.") from error


def _is_message(message: Any) -> bool:
    """A role, and something said or called."""
    return isinstance(message, dict) and bool(message.get("role")) and sum(v is not None for v in message.values()) > 1


def _chat_texts(messages: Any, tokenizer: Any, config: DataConfig) -> list[str]:
    if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
        raise DataError(f"{config.messages} = {messages!r:.80}: must be a list of {{role, content}}. Mend the row")
    # Arrow gives every message the keys of all, None where it has none; transformers 5.17 lets templates print it.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False)]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and config.loss_on != "all"]
    if 0 in turns:
        raise DataError("starts with an assistant turn, which nothing asks for. Drop it or set data.loss_on: all")
    for i in turns:
        texts.append(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
        texts.append(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
    if not all(texts[0].startswith(text) for text in texts):
        value = "the chat template rewrites earlier turns, so what is learnt is not what is generated"
        raise DataError(f"{value}. Set data.loss_on: all, or take a chat_template that leaves them as they were")
    return texts


def _encode(ids: list[list[int]], eos: int | None, config: DataConfig) -> dict[str, Any]:
    """One sample from the ids of a row's text and of the text's beginnings."""
    whole, *beginnings = ids
    # Tokens merge across a border ("A: " + "b" holds a token " b"), so the ids of a beginning need not begin the whole.
    # Generation sees the beginning tokenised alone: what both share is what it is given, the rest is to be learnt.
    borders = [_common_prefix(beginning, whole) for beginning in beginnings]
    if config.loss_on == "all" or config.format == "text":
        borders = [0]
    if config.format != "chat" and eos is not None and whole[-1:] != [eos]:
        whole = [*whole, eos]
    labels = [IGNORE_INDEX] * len(whole)
    for start, stop in zip(borders[::2], [*borders[1::2], len(whole)], strict=False):
        labels[start:stop] = whole[start:stop]
    input_ids, labels = whole[: config.max_length], labels[: config.max_length]
    num_targets = sum(label != IGNORE_INDEX for label in labels[1:])
    counts = {"prompt_length": min([*borders[:1], len(input_ids)]), "num_targets": num_targets}
    return {"input_ids": input_ids, "labels": labels, **counts, "uncut_length": len(whole)}


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation (num_samples,) int64 of an epoch's samples, a function of the arguments alone; do not write to it."""
    return permutation(num_samples, "order", seed, epoch)


def permutation(count: int, *purpose: str | int) -> torch.Tensor:
    """Permutation (count,) int64, a function of the arguments alone.  Pure."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Optimizer steps that see every sample once; the last batch may be smaller."""
    return -(-num_samples // batch_size)


def global_batch(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Samples of optimizer step ``step`` (from 0, counted through all epochs), over all ranks."""
    epoch, position = divmod(step, steps_per_epoch(num_samples, batch_size))
    return epoch_order(num_samples, seed, epoch)[position * batch_size : (position + 1) * batch_size].tolist()


def deal(num_samples: int, micro_batch_size: int, world_size: int, rank: int) -> list[list[int]]:
    """One rank's micro-batches of positions 0..num_samples-1: micro-batch k goes to rank k % world_size.

    Every rank gets as many; one that is missing is an empty list, for which the caller runs a weightless sample.
    """
    rounds = -(-num_samples // (micro_batch_size * world_size))
    starts = [k * micro_batch_size for k in range(rank, rounds * world_size, world_size)]
    return [list(range(start, min(start + micro_batch_size, num_samples))) for start in starts]


def collate(samples: Sequence[Mapping], pad_token_id: int, *, weightless: bool = False) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: (batch, longest) int64, padded on the right.

    Of packed rows (with ``lengths``) also position_ids, from 0 in each document; the padding is a document of its own.
    weightless: two tokens of the first sample without a label, for a rank that only has to join the collectives.
    """
    ids, labels = ([torch.as_tensor(sample[name]).long() for sample in samples] for name in ("input_ids", "labels"))
    if weightless:
        ids, labels = [ids[0][:2]], [torch.full_like(ids[0][:2], IGNORE_INDEX)]
    columns = {"input_ids": (ids, pad_token_id), "labels": (labels, IGNORE_INDEX)}
    columns["attention_mask"] = ([torch.ones_like(row) for row in ids], 0)
    batch = {name: pad_sequence(rows, batch_first=True, padding_value=pad) for name, (rows, pad) in columns.items()}
    if "lengths" in samples[0]:
        width = batch["input_ids"].shape[1]
        documents = [[width]] if weightless else [sample["lengths"] for sample in samples]
        positions = [[torch.arange(n) for n in (*lengths, width - sum(lengths))] for lengths in documents]
        batch["position_ids"] = torch.stack([torch.cat(row) for row in positions])
    return batch


def load_tokenizer(path: str, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer of a model, padding with its own pad token or else its eos or unk token.

    Raises DataError: there is no tokenizer, or none of the three tokens.
    """
    from transformers import AutoTokenizer

    remedy = "model.path needs what a tokenizer's save_pretrained writes"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises plain Exception on a damaged file
        if not trust_remote_code and "trust_remote_code" in str(error):
            rule = "its tokenizer is Python code of its own, which model.trust_remote_code = false does not run"
            raise DataError(f"model.path = {path}: {rule}. Read the code, then set it to true.") from error
        raise DataError(f"model.path = {path}: no tokenizer can be loaded: {_cause(error)}. {remedy}.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"model.path = {path}: has no pad, eos or unk token to pad with. {remedy}, with one of them.")
    return tokenizer
