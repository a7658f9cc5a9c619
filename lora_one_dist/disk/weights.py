"""Safetensors files by byte offset: what is in them without a value read, and values a piece at a time.

We read values by offset, not through the library's memory map: a process then touches its own bytes only, in order,
which parallel file systems serve well and maps do not.  The format is fixed: 8 bytes of length, JSON, values.
Nothing here is collective; peak memory is what the caller asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SAMPLE_BYTES = 4096  # of each tensor, in a fingerprint
MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
BESIDE = (".json", ".model", ".txt", ".jinja")  # what else than weights belongs to a model, by the names' ends
BASE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
FILE_DTYPES = BASE_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class WeightsError(ValueError):
    """A weights file that cannot be read."""


@dataclass(frozen=True)
class TensorSource:
    """Where the values of one tensor lie: file, byte offset of the first, size in bytes, type and shape."""

    path: Path
    offset: int
    num_bytes: int
    kind: str
    """The format's name of the type: F32, BF16, I64, ..."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """None for types that torch does not have."""
        return FILE_DTYPES.get(self.kind)


@dataclass(frozen=True)
class Scales:
    """What the 8-bit values of a matrix (m, n) are multiplied by, a number for each block of it."""

    source: TensorSource
    """(ceil(m / rows), ceil(n / columns)), fp32 or bf16."""
    rows: int
    columns: int


@dataclass(frozen=True)
class Part:
    """A run of elements of a tensor in a file that is a run of another tensor's."""

    source: TensorSource
    start: int
    """Number of its first element in the source."""
    count: int
    at: int
    """Number of its first element in the tensor that it is a part of."""
    scales: Scales | None = None

    @property
    def sources(self) -> list[TensorSource]:
        """All that is read for it."""
        return [self.source] if self.scales is None else [self.source, self.scales.source]


def beside_weights(folder: Path) -> dict[str, Path]:
    """What stands beside a model's weights, by name: config, tokenizer, chat template, licence.  Not collective."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in BESIDE and not path.name.endswith(".index.json")
    }


def read_header(path: Path) -> dict[str, TensorSource]:
    """The tensors of a safetensors file by name, in the order of their values.  Reads no values.

    Raises:
        WeightsError: if the file is cut short or is no safetensors file.
    """
    try:
        length, header = _header(path)
        header.pop("__metadata__", None)
        end = 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            size, dtype = math.prod(entry["shape"]), FILE_DTYPES.get(entry["dtype"])
            if not 0 <= start <= stop or (dtype is not None and stop - start != size * dtype.itemsize):
                raise ValueError(f"{name}: {entry} contradicts itself")
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"{path}: is no safetensors file ({what}). Fetch it again.") from error
    size = path.stat().st_size
    if size != 8 + length + end:
        raise WeightsError(f"{path}: has {size} bytes, its header says {8 + length + end}. Copy or fetch it again.")
    return {
        name: TensorSource(path, 8 + length + start, stop - start, entry["dtype"], tuple(entry["shape"]))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for start, stop in [entry["data_offsets"]]
    }


def fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    """What tells one set of weights from another: names, types, shapes, and SAMPLE_BYTES in the middle of each tensor.

    A base that was trained further differs in every tensor, so this finds it without reading all of it.  Files other
    than safetensors are sampled as if they were one tensor.  Not collective.
    """
    digest, total = hashlib.sha256(), 0
    for path in paths:
        size = path.stat().st_size
        total += size
        spans: list[tuple[str, int, int]] = [(path.name, 0, size)]
        if path.suffix == ".safetensors":
            length, header = _header(path)
            spans = []
            for name, entry in sorted(header.items()):
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    spans.append((f"{name} {entry['dtype']} {entry['shape']}", 8 + length + first, last - first))
        with path.open("rb") as file:
            for label, start, count in spans:
                file.seek(start + max(0, count - SAMPLE_BYTES) // 2)
                digest.update(label.encode() + b"\0" + file.read(min(count, SAMPLE_BYTES)))
    return {"weights": digest.hexdigest(), "bytes": total}


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length in bytes and content of a safetensors file's header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, json.loads(file.read(length) if length < MAX_HEADER_BYTES else b"")
