"""Megatron-core's distributed checkpoints, format ``torch_dist``, as mappings of names to tensors.

Such a folder is in the format of ``torch.distributed.checkpoint`` (``.metadata`` and ``*.distcp``), with
``metadata.json`` and ``common.pt`` beside.  Layers of one kind are stacked along a leading axis, under a name without
their number; here every layer has its own name.  A checkpoint holds whole tensors in pieces, whatever the number of
ranks; we cut them as the ranks that will load them do, so that each reads its own bytes.

Pickles are read by an unpickler that knows the format's own plain classes and turns every other name into something
inert.  Nothing of Megatron is imported.  Peak memory: one tensor in, one tensor out.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from lora_one_dist.convert import files
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, read_json

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
BACKEND |= {"common_backend": "torch", "common_backend_version": 1}
METADATA, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
TRACKER = "latest_checkpointed_iteration.txt"
LAYER = re.compile(r"(?P<front>.*\blayers)\.(?P<layer>\d+)\.(?P<back>.+)")
SKIPPED = ("optimizer.", "chained_", "rng_state", "rerun_state")  # of a training checkpoint: not the model's
EXTRA = "_extra_state"  # of Transformer Engine's layers: the scales of fp8, else nothing
FORMAT = "torch.distributed.checkpoint.metadata"
FORMAT_CLASSES = {
    (FORMAT, "Metadata"),
    (FORMAT, "MetadataIndex"),
    (FORMAT, "StorageMeta"),
    (FORMAT, "TensorProperties"),
}
FORMAT_CLASSES |= {(FORMAT, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")}
FORMAT_CLASSES |= {
    (FORMAT, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("argparse", "Namespace"),
    ("builtins", "set"),
}


@dataclass(frozen=True)
class Checkpoint:
    """What a distributed checkpoint holds of its model."""

    folder: Path
    tensors: dict[str, LazyTensor]
    """Each layer under its own name."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Those of the training that wrote it, if it says."""


class _Inert:
    """Stands for a class that a pickle names and that is not needed: takes everything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in FORMAT_CLASSES or isinstance(dtype, torch.dtype):
            return super().find_class(module, name)
        return _Inert


def _unpickle(path: Path, load: Callable[[], Any], kind: type) -> Any:
    try:
        loaded = load()
    except Exception as error:  # a broken pickle raises anything
        raise ConversionError(
            f"{path}: cannot be read: {' '.join(str(error).split())[:200]}. Copy it again."
        ) from error
    if not isinstance(loaded, kind):
        raise ConversionError(f"{path}: is not of a distributed checkpoint. Give one that Megatron-core wrote.")
    return loaded


def find(folder: Path) -> Path:
    """The folder with the files: what was given, or the iteration that the tracker beside it names."""
    if (folder / METADATA).is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ConversionError(f"{folder}: has neither {METADATA} nor {TRACKER}. Give a checkpoint of Megatron-core.")
    name = tracker.read_text(encoding="utf-8").strip()
    inside = folder / (f"iter_{int(name):07d}" if name.isdigit() else "release")
    if not (inside / METADATA).is_file():
        raise ConversionError(
            f"{inside}: holds no {METADATA}. Save with --ckpt-format torch_dist, or give the whole checkpoint."
        )
    return inside


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of a model in a distributed checkpoint.  Reads no values.

    Raises:
        ConversionError: if a file is missing or cut short, or pieces do not make up their tensor.
    """
    folder = find(folder)
    backend = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if backend.get("sharded_backend") != BACKEND["sharded_backend"]:
        raise ConversionError(
            f"{folder}: its format is {backend.get('sharded_backend')}, must be torch_dist. Save with --ckpt-format "
            "torch_dist."
        )
    path = folder / METADATA
    metadata = _unpickle(path, lambda: _Unpickler(io.BytesIO(path.read_bytes())).load(), Metadata)
    storage = {(index.fqn, tuple(index.offset or ())): where for index, where in metadata.storage_data.items()}
    _refuse_lost_bytes(folder, storage)
    tensors: dict[str, LazyTensor] = {}
    for name, held in metadata.state_dict_metadata.items():
        if isinstance(held, TensorStorageMetadata) and not name.startswith(SKIPPED):
            tensors |= _by_layer(name, _Stored(folder, name, held, storage))
    return Checkpoint(folder, tensors, _arguments(folder))


def _refuse_lost_bytes(folder: Path, storage: Mapping[Any, Any]) -> None:
    ends: dict[str, int] = {}
    for where in storage.values():
        if Path(where.relative_path).name != where.relative_path:
            raise ConversionError(f"{folder}: names a file outside of it. Fetch it from whom you trust.")
        ends[where.relative_path] = max(ends.get(where.relative_path, 0), where.offset + where.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file() or path.stat().st_size < end:
            has = f"has {path.stat().st_size} bytes, must have {end}" if path.is_file() else "missing"
            raise ConversionError(f"{path}: {has}. Copy the whole checkpoint again.")


def _arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the training, as far as they are plain values."""
    path = folder / COMMON
    if not path.is_file():
        return {}
    module = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="restricted")
    common = _unpickle(
        path, lambda: torch.load(path, map_location="cpu", weights_only=False, pickle_module=module), dict
    )
    arguments = common.get("args")
    return vars(arguments) if isinstance(arguments, Namespace) else {}


class _Stored:
    """A tensor of a checkpoint in its pieces."""

    def __init__(self, folder: Path, name: str, held: TensorStorageMetadata, storage: Mapping[Any, Any]):
        self.shape, self.dtype = tuple(held.size), held.properties.dtype
        self.pieces = []
        for chunk in held.chunks:
            where = storage.get((name, tuple(chunk.offsets)))
            if where is None or getattr(where, "transform_descriptors", None):
                why = "is compressed, which is not supported" if where else "is not in any file"
                raise ConversionError(f"{folder}: a piece of {name} {why}. Copy the whole checkpoint again.")
            self.pieces.append((tuple(chunk.offsets), tuple(chunk.sizes), folder / where.relative_path, where))
        if sum(torch.Size(sizes).numel() for _, sizes, _, _ in self.pieces) != torch.Size(self.shape).numel():
            raise ConversionError(f"{folder}: the pieces of {name} are not the whole. Copy the whole checkpoint again.")

    def read(self, layer: int | None = None) -> torch.Tensor:
        """The whole tensor, or one layer of a stacked one."""
        front = () if layer is None else (layer,)
        made = torch.empty(self.shape[len(front) :], dtype=self.dtype)
        for offsets, sizes, path, where in self.pieces:
            inside = [at - start for at, start in zip(front, offsets, strict=False)]
            if any(not 0 <= at < size for at, size in zip(inside, sizes, strict=False)):
                continue
            values = _read_piece(path, where.offset, where.length)[tuple(inside)]
            target = made
            for axis, (start, size) in enumerate(list(zip(offsets, sizes, strict=True))[len(front) :]):
                target = target.narrow(axis, start, size)
            target.copy_(values)
        return made


def _read_piece(path: Path, offset: int, length: int) -> torch.Tensor:
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(length)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the archive does
        raise ConversionError(f"{path}: a tensor in it cannot be read: {error}. Copy the checkpoint again.") from error


def _by_layer(name: str, stored: _Stored) -> dict[str, LazyTensor]:
    """A tensor under its name, or each layer of a stacked one under its own."""
    match = re.fullmatch(r"(?P<front>.*\blayers)\.(?P<back>[^\d].*)", name)
    if match is None:
        return {name: LazyTensor(stored.dtype, stored.shape, stored.read)}
    return {
        f"{match['front']}.{i}.{match['back']}": LazyTensor(
            stored.dtype, stored.shape[1:], functools.partial(stored.read, i)
        )
        for i in range(stored.shape[0])
    }


@dataclass(frozen=True)
class Piece:
    """A part of a stacked or plain tensor of the checkpoint that is to be written."""

    key: str
    offsets: tuple[int, ...]
    source: LazyTensor
    narrow: tuple[int, int, int]
    """Axis, start and length in the source."""
    stacked: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        axis, _, length = self.narrow
        size = [length if i == axis else n for i, n in enumerate(self.source.shape)]
        return (1, *size) if self.stacked else tuple(size)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.source.dtype.itemsize


def write(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    cut: Callable[[str], tuple[int, int]],
    arguments: Mapping[str, Any],
    extra_states: Sequence[str] = (),
    max_bytes: int = files.SHARD_BYTES,
) -> None:
    """Write a distributed checkpoint into an existing folder.

    Args:
        tensors: by name, each layer its own.
        cut: of a name: the axis along which it is cut, and the number of equal pieces.
        arguments: of Megatron's command line, which its loader looks for in ``common.pt``.
        extra_states: names of layers' modules that Megatron asks for an extra state of, which is empty.
        max_bytes: a file is at most so large, or holds one tensor.
    """
    layers = 1 + max((int(m["layer"]) for name in tensors if (m := LAYER.fullmatch(name))), default=-1)
    planner = _Planner(tensors, cut, layers)
    extra = [f"{name}.{EXTRA}/shard_{i}_{layers}" for name in extra_states for i in range(layers)]
    groups: list[Sequence[Piece | str]] = [*_files_of(planner.pieces, max_bytes), extra]
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan([SavePlan(planner.items(group)) for group in groups if group])
    plans = writer.prepare_global_plan(plans)
    progress = files.Progress("tensors", len(planner.pieces), sum(piece.num_bytes for piece in planner.pieces))
    planner.done = progress.add
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(metadata, results)
    progress.end()
    (folder / CONFIG).write_text(json.dumps(BACKEND), encoding="utf-8")
    common = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}
    torch.save({**common, "content_metadata": {"singleton_local_shards": False}}, folder / COMMON)


def _files_of(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Pieces by file, in order; those of one tensor stay together, so that it is read once."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for _, same in itertools.groupby(pieces, key=lambda piece: id(piece.source)):
        together = list(same)
        more = sum(piece.num_bytes for piece in together)
        if groups[-1] and size + more > max_bytes:
            groups.append([])
            size = 0
        groups[-1] += together
        size += more
    return groups


class _Planner(SavePlanner):
    """Tells the library's writer which pieces there are, and gets their values when it asks for them."""

    def __init__(self, tensors: Mapping[str, LazyTensor], cut: Callable[[str], tuple[int, int]], layers: int):
        self.pieces = [piece for name, tensor in tensors.items() for piece in _pieces(name, tensor, *cut(name))]
        self.by_index = {(piece.key, piece.offsets): piece for piece in self.pieces}
        self.layers = layers
        self.done: Callable[[int], None] = lambda _: None
        self.last: tuple[Any, Any] = (None, None)

    def items(self, group: Sequence[Piece | str]) -> list[WriteItem]:
        return [_bytes_item(each) if isinstance(each, str) else self._item(each) for each in group]

    def _item(self, piece: Piece) -> WriteItem:
        size = (self.layers, *piece.source.shape) if piece.stacked else piece.source.shape
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)),
            properties=TensorProperties(dtype=piece.source.dtype),
            size=torch.Size(size),
        )
        return WriteItem(MetadataIndex(piece.key, torch.Size(piece.offsets)), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)
            content.seek(0)
            return content
        piece = self.by_index[write_item.index.fqn, tuple(write_item.index.offset or ())]
        if self.last[0] is not piece.source:
            self.last = (None, None)  # before the next is read
            self.last = (piece.source, piece.source.read())
        self.done(piece.num_bytes)
        return self.last[1].narrow(*piece.narrow).reshape(piece.sizes).clone()

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise AssertionError("plans are made here, not by the library")

    def create_local_plan(self) -> SavePlan:
        raise AssertionError("plans are made here, not by the library")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise AssertionError("plans are made here, not by the library")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise AssertionError("plans are made here, not by the library")


def _bytes_item(key: str) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)


def _pieces(name: str, tensor: LazyTensor, axis: int, count: int) -> list[Piece]:
    """A tensor cut in equal parts; a layer's has its number as the first offset."""
    match = LAYER.fullmatch(name)
    key = f"{match['front']}.{match['back']}" if match else name
    length = tensor.shape[axis] // count
    made = []
    for i in range(count):
        offsets = [i * length if a == axis else 0 for a in range(len(tensor.shape))]
        front = [int(match["layer"])] if match else []
        made.append(Piece(key, (*front, *offsets), tensor, (axis, i * length, length), match is not None))
    return made
