"""Tokenised data on disk: made once by all cores of a host, found by every rank and later run with the same inputs.

In: rows and an encoder.  Out: an Arrow file in the cache of `datasets`, named by what it was made of.  It appears
whole, under another name until then: processes and hosts that share the folder need no lock, and whoever is last
replaces a file by an equal one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one_dist.data.encode import Encoder
from lora_one_dist.data.rows import Rows

if TYPE_CHECKING:
    import pyarrow

CODE = Path(__file__).parent
CHUNK = 500  # rows that a process takes at once
WORTH_PROCESSES = 10.0  # seconds of work for one process; they take some to start
TELL_EVERY = 10.0  # seconds
# The settings that change a row's tokens; the others may change without making a cached result stale.
TOKEN_FIELDS = {"format", "prompt", "completion", "messages", "tools", "text", "loss_on", "max_length"}

_encoder: Encoder | None = None  # of a worker process


def cached(rows: Rows, encoder: Encoder, workers: int, say: Callable[[str], None] | None) -> Path:
    """The file of the tokenised rows, made if it is not there.

    Raises RowError: of the first row that does not fit; OSError (:mod:`cache`).
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora_one_dist"
    path = folder / f"{key(rows, encoder)}.arrow"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{path.stem}.{uuid.uuid4().hex}"  # of this writer alone, whatever host or container it is on
    try:
        with partial.open("xb") as file:
            _write(_tables(rows, encoder, workers), len(rows), file, say)
            file.flush()
            os.fsync(file.fileno())  # a host that fails leaves no half of it under the name
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def key(rows: Rows, encoder: Encoder) -> str:
    """SHA-256 of all that decides the tokens: rows, tokenizer, settings, the date where a template reads it, code."""
    tokenizer, config = encoder.tokenizer, encoder.config
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(CODE.glob("*.py"))]
    told = [
        rows.key(),
        config.model_dump(include=TOKEN_FIELDS),
        _tokenizer_key(tokenizer),
        str(encoder.date) if "strftime_now" in str(tokenizer.chat_template) else None,
        [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        code,
        encoder.with_encoder,
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def _tokenizer_key(tokenizer: Any) -> list[Any]:
    from datasets.fingerprint import Hasher

    if not tokenizer.is_fast:
        return [Hasher.hash(tokenizer)]
    # Its truncation and padding are those of the last call.
    whole = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    held = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    return [held, tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]


def _write(tables: Iterator[pyarrow.Table], count: int, file: Any, say: Callable[[str], None] | None) -> None:
    import pyarrow

    started = told = time.monotonic()
    rows, tokens, writer = 0, 0, None
    for table in tables:
        if writer is None:
            writer = pyarrow.ipc.new_stream(file, table.schema)
        writer.write_table(table)
        rows += len(table)
        tokens += len(table["input_ids"].combine_chunks().flatten())
        now = time.monotonic()
        if say is not None and now - told >= TELL_EVERY:
            told = now
            left = (count - rows) * (now - started) / rows
            say(f"tokenized {rows} of {count} rows, {tokens} tokens, {left:.0f} s left")
    assert writer is not None, "there is at least one row"
    writer.close()


def _tables(rows: Rows, encoder: Encoder, workers: int) -> Iterator[pyarrow.Table]:
    """Of all chunks in their order: the first ones here, the rest by more processes where that pays."""
    chunks, started, done = rows.chunks(CHUNK), time.monotonic(), 0
    for chunk in chunks:
        table = encoder.encode(chunk)
        yield table
        done += len(table)
        left = (len(rows) - done) * (time.monotonic() - started) / done
        if workers > 1 and left > WORTH_PROCESSES:
            break
    else:
        return
    # Started anew, not forked: this process has threads (of torch, of collectives) that a fork would leave locked.
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (encoder,)) as pool:
        ahead: deque[Future[pyarrow.Table]] = deque()
        for chunk in chunks:
            ahead.append(pool.submit(_encode, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _begin(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core is enough
    _encoder = encoder


def _encode(chunk: Any) -> pyarrow.Table:
    assert _encoder is not None
    return _encoder.encode(chunk)
