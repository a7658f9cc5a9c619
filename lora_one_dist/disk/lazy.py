"""Tensors whose type and shape are known and whose values are read when they are needed.

A checkpoint of any format is a mapping of names to :class:`LazyTensor`.  Nothing here is collective.  Peak memory: one
tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.disk.weights import FILE_DTYPES, TensorSource, WeightsError, read_header

KINDS = {dtype: kind for kind, dtype in FILE_DTYPES.items()}  # what the safetensors format calls each type


class ConversionError(ValueError):
    """Something that cannot be converted: value, rule, remedy."""


def listed(problems: Sequence[str], most: int = 3) -> str:
    """Problems in one line: the first ones, and how many there are."""
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose type and shape are known and whose values ``read`` gets, anew at each call."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(source: TensorSource) -> LazyTensor:
    """A tensor of a safetensors file."""
    dtype = source.dtype
    if dtype is None:
        raise ConversionError(
            f"{source.path}: holds a tensor of type {source.kind}, which torch has not. Update torch."
        )
    return LazyTensor(dtype, source.shape, lambda: _read(source, dtype))


def _read(source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(source.shape, dtype=dtype)
    view: Any = _bytes_of(tensor)
    with source.path.open("rb", buffering=0) as file:
        file.seek(source.offset)
        done = 0
        while done < source.num_bytes:  # one call reads at most 2 GiB
            got = file.readinto(view[done:])
            if not got:
                raise WeightsError(f"{source.path}: ended early; it changed after its header was read.")
            done += got
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_safetensors(paths: Sequence[Path]) -> dict[str, LazyTensor]:
    """The tensors of several files as one mapping.

    Raises:
        ConversionError, WeightsError: for a missing or broken file, or a name that two of them hold.
    """
    found: dict[str, LazyTensor] = {}
    for path in paths:
        if not path.is_file():
            raise ConversionError(f"{path}: missing. Copy or fetch the whole checkpoint again.")
        for name, source in read_header(path).items():
            if name in found:
                raise ConversionError(
                    f"{path}: holds {name}, as another of its files does. Fetch the checkpoint again."
                )
            found[name] = stored(source)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConversionError if it cannot be read or holds no mapping."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}. Copy it again.") from error


def held(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are there, as they are when they are read; brought to the host one at a time."""
    return {
        name: LazyTensor(tensor.dtype, tuple(tensor.shape), partial(_on_host, tensor))
        for name, tensor in tensors.items()
    }


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def pieces(tensors: Mapping[str, LazyTensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, in pieces of a tensor each behind the header, which follows from types and shapes alone."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wider types first, as the library writes them: so each tensor starts at a multiple of its type's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, tensor in ordered:
        values = tensor.read()
        found, planned = (values.dtype, tuple(values.shape)), (tensor.dtype, tensor.shape)
        assert found == planned, f"{name} came as {found}, was announced as {planned}"
        yield _bytes_of(values)
        del values  # before the next is read


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], done: Callable[[int], None] = lambda _: None
) -> None:
    """Write one file, a tensor at a time.

    Args:
        done: told the bytes of each tensor that is written.
    """
    written = pieces(tensors)
    with path.open("wb") as file:
        file.write(next(written))
        for values in written:
            file.write(values)
            done(len(values))
            del values  # before the next is read
        file.flush()
        os.fsync(file.fileno())
