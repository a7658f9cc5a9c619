"""The trained weights of a DeepSpeed ZeRO checkpoint: the optimizer's fp32 masters, put together from all ranks' files.

The files are pickles: nothing but tensors and plain values is taken from them, and no class of DeepSpeed is needed.
They are mapped, not read.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.disk.lazy import ConversionError, LazyTensor

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")


class _Inert:
    """Stands for a class of DeepSpeed inside a checkpoint: takes what it is given and does nothing."""

    def __init__(self, *args: Any):
        self.args = args


# What DeepSpeed's own code puts beside the tensors. Anything else is refused by torch.load.
STAND_INS = [
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
]


@dataclass(frozen=True)
class Checkpoint:
    """The trained weights of a ZeRO checkpoint and where it is."""

    folder: Path
    """That holds the files of the ranks."""
    stage: int
    world_size: int
    step: int
    tensors: dict[str, LazyTensor]
    """By the names that the optimizer knows: with the adapter's."""


def is_checkpoint(folder: Path) -> bool:
    """Does a folder look like a checkpoint of DeepSpeed?"""
    return folder.is_dir() and ((folder / "latest").is_file() or bool(_rank_files(folder, OPTIMIZER_FILE)))


def open_checkpoint(folder: Path, tag: str | None = None, dtype: torch.dtype | None = None) -> Checkpoint:
    """The trained weights of a checkpoint.  Reads no values.

    Raises:
        ConversionError: if files are missing, or of several saves, or hold no ZeRO optimizer.
    """
    folder = _tag_folder(folder, tag)
    model_files, optimizer_files = _rank_files(folder, MODEL_FILE), _rank_files(folder, OPTIMIZER_FILE)
    if not model_files or not optimizer_files:
        lacking = "model" if not model_files else "optim"
        raise ConversionError(
            f"{folder}: holds no *_{lacking}_states.pt of ZeRO. Give a checkpoint that was saved with its optimizer."
        )
    loaded = [(path, _load(path)) for path in optimizer_files]
    states = [_part(path, content, "optimizer_state_dict", dict) for path, content in loaded]
    stage, world_size = _layout(optimizer_files, states)
    _refuse_missing(folder, len(model_files), world_size if stage == 3 else 1, "model_states.pt")
    models = [_load(path) for path in model_files]
    _refuse_other_world_size(folder, models, world_size)
    step = _step(folder, models, states)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = [_groups(path, state, key) for path, state in zip(optimizer_files, states, strict=True)]
    shapes = _part(model_files[0], models[0], "param_shapes", list)
    if stage == 3:
        pieces = _stage_3(folder, shapes, groups)
    else:
        pieces = _stage_1_2(folder, shapes, groups, states[0].get("param_alignment_paddings"))
    live = _part(model_files[0], models[0], "module", dict)
    tensors = {
        name: _tensor(folder, name, tuple(shape), pieces[name], live.get(name), dtype)
        for group in shapes
        for name, shape in group.items()
    }
    shared = models[0].get("shared_params") or {}
    tensors |= {name: tensors[same] for name, same in shared.items() if same in tensors}
    return Checkpoint(folder, stage, world_size, step, tensors)


def _refuse_other_world_size(folder: Path, models: Sequence[dict[str, Any]], world_size: int) -> None:
    for model in models:
        count = model.get("dp_world_size", world_size)
        if count != world_size:
            raise ConversionError(
                f"{folder}: its optimizer is of {world_size} ranks, its model of {count}: files of two saves. Copy the "
                "whole checkpoint again."
            )


def _tag_folder(folder: Path, tag: str | None) -> Path:
    if not folder.is_dir():
        raise ConversionError(f"{folder}: is no folder. Give that of a DeepSpeed checkpoint.")
    if tag is None and _rank_files(folder, OPTIMIZER_FILE):
        return folder
    latest = folder / "latest"
    if tag is None and not latest.is_file():
        raise ConversionError(
            f"{folder}: has neither *_optim_states.pt nor a file latest. Give the folder of a ZeRO "
            "checkpoint, or --tag."
        )
    name = tag or latest.read_text(encoding="utf-8").strip()
    if Path(name).name != name or not (folder / name).is_dir():
        raise ConversionError(f"{folder / name}: there is no such checkpoint. Give the whole folder, or another --tag.")
    return folder / name


def _rank_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a kind in the order of their ranks."""
    found = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match is not None:
            if int(match["part"]) > 0:
                raise ConversionError(
                    f"{path}: is one part of a model cut by tensor parallelism, which is not supported. Save it whole."
                )
            found[int(match["rank"] or 0)] = path
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise ConversionError(
            f"{folder}: the file of rank {missing[0]} that belongs beside {found[max(found)].name} is missing. Copy "
            "the whole checkpoint again."
        )
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict[str, Any]:
    """Content of a .pt file, its tensors mapped.  Runs nothing that the file names."""
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in STAND_INS]):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises whatever the archive and the pickle do
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        why = f"names {named[1]}, which could run code" if named else " ".join(str(error).split())[:200]
        raise ConversionError(
            f"{path}: cannot be read: {why}. Copy it again, or fetch it from whom you trust."
        ) from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path}: is no checkpoint of DeepSpeed. Give the folder that it wrote.")
    return loaded


def _part(path: Path, loaded: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(loaded.get(key), kind):
        raise ConversionError(f"{path}: holds no {key}. Give a checkpoint that ZeRO saved with its optimizer.")
    return loaded[key]


def _layout(paths: Sequence[Path], states: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Stage and number of ranks, which all files must agree on."""
    found = []
    for path, state in zip(paths, states, strict=True):
        stage, count = state.get("zero_stage"), state.get("partition_count")
        number = stage.args[0] if isinstance(stage, _Inert) and stage.args else stage
        if not isinstance(number, int) or number not in (1, 2, 3):
            raise ConversionError(f"{path}: its zero_stage is {number}, must be 1, 2 or 3. Save it with ZeRO.")
        counts = count if isinstance(count, list) else [count]  # ZeRO-1 and 2 say it for each parameter group
        if not all(isinstance(each, int) for each in counts):
            raise ConversionError(f"{path}: its partition_count is {count}, must be a number. Copy it again.")
        found.append((number, max(counts)))
    if len(set(found)) > 1:
        other = next(i for i, pair in enumerate(found) if pair != found[0])
        raise ConversionError(
            f"{paths[other]}: is of ZeRO-{found[other][0]} with {found[other][1]} ranks, {paths[0].name} of "
            f"ZeRO-{found[0][0]} with {found[0][1]}: files of two saves. Copy the whole checkpoint again."
        )
    _refuse_missing(paths[0].parent, len(paths), found[0][1], "optim_states.pt")
    return found[0]


def _refuse_missing(folder: Path, count: int, wanted: int, kind: str) -> None:
    if count != wanted:
        raise ConversionError(f"{folder}: has {count} *_{kind}, must have {wanted}. Copy the whole checkpoint again.")


def _step(folder: Path, models: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]) -> int:
    """Optimizer steps so far, which all files must agree on."""
    saved = sorted({int(model.get("global_steps", -1)) for model in models})
    taken = sorted(set(itertools.chain.from_iterable(map(_optimizer_steps, states))))
    if len(saved) > 1 or len(taken) > 1:
        raise ConversionError(
            f"{folder}: its files are of the steps {saved if len(saved) > 1 else taken}: of several saves. Copy the "
            "whole checkpoint again."
        )
    return saved[0]


def _optimizer_steps(state: dict[str, Any]) -> set[int]:
    """What the wrapped optimizer counted; empty if it does not count."""
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    per_group = inner.get("state", {}).values() if isinstance(inner, dict) else inner
    return {int(entry["step"]) for entry in per_group if isinstance(entry, dict) and "step" in entry}


def _groups(path: Path, state: dict[str, Any], key: str) -> list[torch.Tensor]:
    """A rank's flat part of each parameter group."""
    groups = _part(path, state, key, list)
    if not groups or not all(isinstance(group, torch.Tensor) for group in groups):
        raise ConversionError(f"{path}: its {key} holds no weights. Save with the optimizer in memory, not on NVMe.")
    return [group.view(-1) for group in groups]


Pieces = dict[str, list[tuple[torch.Tensor, int, int]]]  # of each parameter: tensor, first element, number of elements


def _stage_1_2(
    folder: Path, shapes: Sequence[dict[str, Any]], ranks: Sequence[list[torch.Tensor]], paddings: Any
) -> Pieces:
    """ZeRO-1 and 2: each group's parameters one after the other, cut in equal parts by rank."""
    pieces: Pieces = {}
    for index, group in enumerate(shapes):
        parts = [rank[index] for rank in ranks]
        start = 0
        for position, (name, shape) in enumerate(group.items()):
            count = math.prod(shape)
            pieces[name] = _span(parts, start, count)
            start += count + (paddings[index][position] if paddings else 0)
        _refuse_wrong_size(folder, start, sum(part.numel() for part in parts), 2 * len(ranks))
    return pieces


def _stage_3(folder: Path, shapes: Sequence[dict[str, Any]], ranks: Sequence[list[torch.Tensor]]) -> Pieces:
    """ZeRO-3: of every parameter, ceil(numel / ranks) elements at each rank, the last part padded."""
    pieces: Pieces = {}
    start = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        count = math.prod(shape)
        share = math.ceil(count / len(ranks))
        left = count
        pieces[name] = []
        for rank in ranks:
            pieces[name] += _span(rank, start, min(share, left))
            left -= min(share, left)
        start += share
    for rank in ranks:
        _refuse_wrong_size(folder, start, sum(part.numel() for part in rank), 1)
    return pieces


def _span(parts: Sequence[torch.Tensor], start: int, count: int) -> list[tuple[torch.Tensor, int, int]]:
    """Where ``count`` elements from ``start`` lie in tensors that follow each other."""
    found = []
    for part in parts:
        here = min(count, part.numel() - start)
        if here > 0:
            found.append((part, start, here))
            count -= here
        start = max(0, start - part.numel())
    return found


def _refuse_wrong_size(folder: Path, wanted: int, held: int, multiple: int) -> None:
    """ZeRO pads a group's end up to a multiple."""
    if math.ceil(wanted / multiple) != math.ceil(held / multiple):
        raise ConversionError(
            f"{folder}: its optimizer holds {held} numbers, param_shapes says {wanted}: files of two saves. Copy the "
            "whole checkpoint again."
        )


def _tensor(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    pieces: Sequence[tuple[torch.Tensor, int, int]],
    live: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> LazyTensor:
    """A parameter of its pieces, as the model held it or in ``dtype``."""
    if live is None:
        raise ConversionError(f"{folder}: its model_states.pt lacks {name}. Copy the whole checkpoint again.")
    model_dtype, whole = live.dtype, tuple(live.shape) == shape

    def read() -> torch.Tensor:
        master = torch.cat([tensor[start : start + count] for tensor, start, count in pieces]).view(shape)
        if whole and not torch.equal(master.to(model_dtype), live):
            raise ConversionError(
                f"{folder}: {name} is another in the optimizer than in the model: files of two saves. Copy the whole "
                "checkpoint again."
            )
        return master.to(dtype or model_dtype)

    return LazyTensor(dtype or model_dtype, shape, read)
