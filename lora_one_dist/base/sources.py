"""Where in a checkpoint's files the values of each parameter lie, whatever names and cuts it has.

In: safetensors files and a skeleton (:mod:`skeleton`).  Out: for every parameter and persistent buffer the runs of
elements that make it up (:class:`~lora_one_dist.disk.weights.Part`).  transformers knows what it renames, fuses and
splits: its own operations are run on numbers of rows in the place of rows, and where each number ends up is read off.
Reads headers and no values; not collective.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lora_one_dist.base.skeleton import cause_of
from lora_one_dist.disk.weights import BASE_DTYPES, Part, Scales, TensorSource, read_header

SCALE = "_scale_inv"  # behind the name of a tensor of 8 bits, as DeepSeek and Qwen publish them
ROTARY = r"rotary_emb\.inv_freq$"  # old checkpoints hold them; they are computed


class NotSliceableError(ValueError):
    """A checkpoint whose parameters are no runs of elements of its files: which, and why."""


@dataclass(frozen=True)
class Sources:
    """What of a checkpoint makes up a model."""

    parts: dict[str, list[Part]]
    """By name of parameter or persistent buffer, in the order of its elements; one name of those that are tied."""
    ignored: list[str]
    """What the files hold beside, which neither the model nor transformers' list of things to pass over knows."""


@dataclass(frozen=True)
class _Made:
    """A tensor of the model, as the files make it."""

    shape: tuple[int, ...]
    parts: list[Part]


@dataclass
class _Meeting:
    """The tensors of the files that make up one parameter, or several."""

    converter: Any
    """transformers' WeightConverter, or None: one tensor under its own or another name."""
    keys: list[tuple[str, str | None]] = field(default_factory=list)
    """Name in the files, and the converter's pattern that it matched."""


def find_sources(files: Sequence[Path], model: Any, block: Sequence[int] | None = None) -> Sources:
    """The sources of every parameter and persistent buffer of ``model``.

    Args:
        block: (rows, columns) that share a scale in files of 8-bit values; None: these hold the values themselves.

    Raises:
        NotSliceableError: some tensor is missing, has another shape or type, or is made by arithmetic.
    """
    found: dict[str, TensorSource] = {}
    for path in files:
        found |= read_header(path)
    scales = _take_scales(found, block)
    state = model.state_dict(keep_vars=True)
    meetings, extra = _meetings(found, model, state)
    made: dict[str, _Made] = {}
    for target, meeting in meetings.items():
        if meeting.converter is not None:
            made |= _converted(target, meeting, found, model)
        else:
            source = found[meeting.keys[0][0]]
            made[target] = _Made(source.shape, [Part(source, 0, math.prod(source.shape), 0)])
    made = {name: _scaled(tensor, scales) for name, tensor in made.items()}
    wanted = _one_of_the_tied(state, made)
    for name in wanted:
        _refuse_misfit(name, state[name], made[name])
    known = {name for name, _ in model.named_buffers()}
    passed = re.compile("|".join([ROTARY, *(model._keys_to_ignore_on_load_unexpected or ())]))
    ignored = [name for name in extra if name not in known and not passed.search(name)]
    return Sources({name: made[name].parts for name in wanted}, ignored)


def renamed(model: Any) -> list[str]:
    """Names of the model's own tensors that ``from_pretrained`` takes for others, where a file has them."""
    state = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    read = {name: rename_source_key(name, renamings, converters, model.base_model_prefix, state) for name in state}
    return [name for name, (target, pattern) in read.items() if target != name or pattern is not None]


def _meetings(
    found: Mapping[str, TensorSource], model: Any, state: dict[str, Any]
) -> tuple[dict[str, _Meeting], list[str]]:
    """By first name that they become, the files' tensors that come together; and those that become nothing."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    meetings: dict[str, _Meeting] = {}
    extra = []
    for key in sorted(found, key=dot_natural_key):  # plain sorting has expert 10 before expert 2
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if target not in state:
            if not target.startswith(model.towers_dropped):
                extra.append(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        meeting = meetings.setdefault(target, _Meeting(converter))
        if converter is None and meeting.keys:  # two names of one: the one that needs no renaming
            if key == target:
                meeting.keys = [(key, None)]
            continue
        meeting.keys.append((key, pattern))
    return meetings, extra


def _converted(target: str, meeting: _Meeting, found: Mapping[str, TensorSource], model: Any) -> dict[str, _Made]:
    """What transformers' operations make of the tensors, by doing them to the numbers of their rows."""
    converter = copy.deepcopy(meeting.converter)  # it holds what it is given
    sources = [found[key] for key, _ in meeting.keys]
    widths = {source.shape[-1] if len(source.shape) > 1 else 1 for source in sources}
    if len(widths) > 1:
        raise NotSliceableError(f"{target} is made of rows of {sorted(widths)} elements")
    first, firsts = 0, []
    for (key, pattern), source in zip(meeting.keys, sources, strict=True):
        shape = (*source.shape[:-1], 1) if len(source.shape) > 1 else tuple(source.shape)
        count = math.prod(shape)
        numbers = torch.arange(first, first + count).view(shape)
        converter.add_tensor(target, key, pattern, lambda numbers=numbers: numbers)
        firsts.append(first)
        first += count
    try:
        converted = converter.convert(target, model=model, config=model.config)
    except Exception as error:  # an operation that asks for more than row numbers are
        raise NotSliceableError(f"{target} is not made of whole rows ({cause_of(error)})") from error
    (width,) = widths
    rows_of = {name: held[0] if isinstance(held, list) else held for name, held in converted.items()}
    return {
        name: _Made((*rows.shape[:-1], rows.shape[-1] * width), _runs(rows, width, firsts, sources))
        for name, rows in rows_of.items()
    }


def _runs(numbers: torch.Tensor, width: int, firsts: list[int], sources: list[TensorSource]) -> list[Part]:
    """The runs of successive rows in ``numbers``, as elements.  Raises NotSliceableError: they are numbers no more.

    Args:
        numbers: (..., 1), or (n,) for single elements.  width: elements of a row.
        firsts: number of each source's first row.
    """
    flat = numbers.reshape(-1)
    if numbers.dtype != torch.int64:
        raise NotSliceableError("values are computed, not moved")
    bounds = torch.tensor([*firsts[1:], 2**62])
    owner = torch.searchsorted(bounds, flat, right=True)
    breaks = (flat.diff() != 1) | (owner.diff() != 0)
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    runs = []
    for start, stop in zip(starts, [*starts[1:], flat.numel()], strict=True):
        index = int(owner[start])
        row = int(flat[start]) - firsts[index]
        runs.append(Part(sources[index], row * width, (stop - start) * width, start * width))
    return runs


def _take_scales(found: dict[str, TensorSource], block: Sequence[int] | None) -> dict[TensorSource, Scales]:
    """Of each 8-bit tensor its scales, which are taken out of ``found``.  Raises NotSliceableError: they do not fit."""
    if block is None:
        return {}
    scales = {}
    for name in [name for name in found if name.endswith(SCALE)]:
        factors, weight = found.pop(name), found.get(name.removesuffix(SCALE))
        if weight is None:
            raise NotSliceableError(f"{name} belongs to no tensor")
        blocks = tuple(-(-size // by) for size, by in zip(weight.shape, block, strict=False))
        if len(weight.shape) != 2 or factors.shape != blocks or factors.kind not in BASE_DTYPES:
            raise NotSliceableError(
                f"{name} has the shape {factors.shape}, for blocks of {tuple(block)} it is {blocks}"
            )
        scales[weight] = Scales(factors, *block)
    return scales


def _scaled(made: _Made, scales: Mapping[TensorSource, Scales]) -> _Made:
    return replace(made, parts=[replace(part, scales=scales.get(part.source)) for part in made.parts])


def _one_of_the_tied(state: Mapping[str, torch.Tensor], made: Mapping[str, Any]) -> list[str]:
    """For each tensor of the model the first of its names that the files have.  Raises NotSliceableError: none."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    there = [(names, [name for name in names if name in made]) for names in names_of.values()]
    if lacking := [names[0] for names, present in there if not present]:
        raise NotSliceableError(f"{len(lacking)} tensors have no values under the names that transformers knows")
    return [present[0] for _, present in there]


def _refuse_misfit(name: str, tensor: torch.Tensor, made: _Made) -> None:
    if made.shape != tuple(tensor.shape):
        raise NotSliceableError(f"{name} has the shape {made.shape}, which config.json makes {tuple(tensor.shape)}")
    if kinds := {part.source.kind for part in made.parts if part.scales is None} - BASE_DTYPES.keys():
        raise NotSliceableError(f"{name} is stored as {min(kinds)}")
