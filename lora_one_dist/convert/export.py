"""An adapter of ours, or any plain LoRA adapter, as the PEFT folder that a server takes.

In: a run folder, one of its checkpoints, or a PEFT folder.  Out: a PEFT folder: the same adapter, or the nearest one of
a smaller rank, whose distance is known for every layer.  Peak memory: of one layer of rank R, a
few times (m + n) R numbers in fp64.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.adapters import peft_format
from lora_one_dist.adapters.peft_format import Layer
from lora_one_dist.convert import files
from lora_one_dist.disk import folders
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed, read_json, read_safetensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORT = "export_report.json"


@dataclass(frozen=True)
class Plan:
    """What an export will write, and what its user should know."""

    config: dict[str, Any]
    layers: dict[str, Layer]
    r: int
    """Of what is written."""
    dtype: torch.dtype | None
    """None: each tensor's own."""
    notes: list[str]

    @property
    def changes(self) -> bool:
        """Is what is written another adapter, of a smaller rank or rounded?"""
        return any(layer.r > self.r or self.dtype not in (None, layer.A.dtype) for layer in self.layers.values())

    @property
    def num_bytes(self) -> int:
        return sum(
            min(self.r, layer.r) * (layer.A.shape[1] + layer.B.shape[0]) * (self.dtype or layer.A.dtype).itemsize
            for layer in self.layers.values()
        )


def plan(
    source: Path, r: int | None = None, dtype: torch.dtype | None = None, masters: bool = False, step: int | None = None
) -> Plan:
    """Find and check the adapter.  Reads no values.

    Args:
        source: run folder (its newest checkpoint, or that of ``step``), checkpoint or PEFT folder.
        r: rank to truncate to; None keeps it.
        dtype: to write in; None keeps it.
        masters: take the optimizer's fp32 weights instead of the copies that the model computed with.
    """
    folder, notes = adapter_folder(source, step)
    opened = peft_format.open_folder(folder)
    config, layers = dict(opened.config), dict(opened.layers)
    ranks = {layer.r for layer in layers.values()}
    beyond = opened.beyond_pairs()
    if beyond:
        raise ConversionError(
            f"{folder}: {listed(beyond)}, which is not LoRA alone. Merge it with tools/merge_adapter.py."
        )
    if masters:
        layers = _with_masters(folder, layers)
        notes.append("weights: the optimizer's fp32 masters")
    largest = max(ranks)
    wanted = largest if r is None else r
    if not 1 <= wanted <= largest:
        raise ConversionError(f"--rank {wanted}: must be from 1 to {largest}, the adapter's. Give one of these.")
    if wanted < largest and (len(ranks) > 1 or config.get("rank_pattern") or config.get("alpha_pattern")):
        raise ConversionError(
            f"--rank {wanted}: the adapter has a rank_pattern or alpha_pattern, and only one rank for all layers can "
            "be truncated. Leave --rank out."
        )
    if wanted < largest:
        root = math.sqrt(wanted / largest) if config.get("use_rslora") else wanted / largest
        config |= {"r": wanted, "lora_alpha": config["lora_alpha"] * root}  # the scale stays what it is
    notes.append(
        f"{len(layers)} layers, rank {largest}" + (f" truncated to {wanted}" if wanted < largest else ", exact")
    )
    return Plan(config, layers, wanted, dtype, notes)


def run(planned: Plan, out: Path) -> list[dict[str, Any]]:
    """Write the PEFT folder, with a report if it was truncated.  Returns a row for each layer: name, errors.

    ``error`` is the Frobenius norm of what was and what is added to the layer's weight, ``relative`` that over the norm
    of what was added; rounding to the dtype is part of both.
    """
    rows: dict[str, dict[str, Any]] = {}

    @functools.lru_cache(maxsize=1)  # A and B of a layer are asked for one after the other
    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        made = _pair(planned, planned.layers[name])
        if planned.changes:
            rows[name] = {"layer": name, **errors(planned.layers[name], *made)}
        return made

    def half(name: str, side: int, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        return LazyTensor(planned.dtype or dtype, shape, lambda: pair(name)[side])

    tensors = {}
    for name, layer in planned.layers.items():
        (_, n), (m, _), r = layer.A.shape, layer.B.shape, min(layer.r, planned.r)
        A, B = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{peft_format.PREFIX}{name}.{A}"] = half(name, 0, (r, n), layer.A.dtype)
        tensors[f"{peft_format.PREFIX}{name}.{B}"] = half(name, 1, (m, r), layer.A.dtype)
    with files.new_folder(out, planned.num_bytes) as partial:
        progress = files.Progress("tensors", len(tensors), planned.num_bytes)
        peft_format.write(partial, planned.config, tensors, progress.add)
        progress.end()
        if planned.changes:
            (partial / REPORT).write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
    return list(rows.values())


def _pair(planned: Plan, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = layer.A.read(), layer.B.read()
    dtype = planned.dtype or A.dtype
    if layer.r > planned.r:
        A, B = truncate(A, B, planned.r)
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


def truncate(A: torch.Tensor, B: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank-r pair nearest to ``B A`` (Eckart-Young), without forming it: SVD of an R x R core.  Pure.

    Args:
        A: (R, n).  B: (m, R).

    Returns:
        A' (r, n), B' (m, r) in fp64, the singular values shared evenly.
    """
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    root = S[:r].sqrt()
    return (root[:, None] * Vh[:r]) @ Qa.T, Qb @ U[:, :r] * root


def errors(layer: Layer, A: torch.Tensor, B: torch.Tensor) -> dict[str, float]:
    """``||scale (B A - B' A')||_F`` of a layer and another pair, and that over ``||scale B A||_F``.  Pure."""
    before_A, before_B = layer.A.read().double(), layer.B.read().double()
    error = layer.scale * norm_of_product(torch.cat([before_B, -B.double()], 1), torch.cat([before_A, A.double()]))
    whole = layer.scale * norm_of_product(before_B, before_A)
    return {"error": error, "relative": error / whole if whole else 0.0}


def norm_of_product(B: torch.Tensor, A: torch.Tensor) -> float:
    """``||B A||_F`` from the triangular factors of both: nothing of size m n, no squares lost.  Pure."""
    return float(torch.linalg.norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T))


def adapter_folder(source: Path, step: int | None) -> tuple[Path, list[str]]:
    """The PEFT folder inside whatever was given, and what to say of it."""
    checkpoints = source / "checkpoints"
    if checkpoints.is_dir():
        newest = checkpoints / "latest"
        if step is None and not newest.is_file():
            raise ConversionError(f"{source}: its checkpoints have no file latest. Give one of them, or --step.")
        name = newest.read_text(encoding="utf-8").strip() if step is None else f"step-{step}"
        source = checkpoints / name
        if not source.is_dir():
            held = ", ".join(sorted(path.name for path in checkpoints.glob("step-*"))) or "none"
            raise ConversionError(f"{source}: there is no such checkpoint. Give one of these: {held}.")
    elif step is not None:
        raise ConversionError(f"--step {step}: {source} is no run folder. Leave it out.")
    if (source / "state.json").is_file():
        wrong = folders.own_fault(source)
        if wrong is not None:
            raise ConversionError(f"{wrong}. Take another checkpoint.")
        state = read_json(source / "state.json")
        if not (source / "adapter").is_dir() and (source / "model").is_dir():
            raise ConversionError(
                f"{source}: is of a run with train.mode full, which has no adapter. Take its {source / 'model'}."
            )
        return source / "adapter", [f"{source}: step {state['step']}, every hash as written"]
    if not (source / peft_format.CONFIG).is_file():
        raise ConversionError(f"{source}: is no run folder, no checkpoint and no PEFT folder. Give one of these.")
    return source, []


def _with_masters(folder: Path, layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers with fp32 masters in place of A and B, and A0, B0 behind them where the export has rank 2r."""
    paths = sorted(folder.parent.glob("optimizer-*-of-*.safetensors"))
    if not paths:
        raise ConversionError(f"{folder.parent}: holds no optimizer. Give a checkpoint, or leave --masters out.")
    masters = read_safetensors(paths)
    return {name: _with_master(layer, masters, folder.parent) for name, layer in layers.items()}


def _with_master(layer: Layer, masters: dict[str, LazyTensor], where: Path) -> Layer:
    pair = []
    if f"{layer.name}.lora_E.master" in masters:
        raise ConversionError(f"{where}: AdaLoRA's B is exported with E in it, its master is not. Leave --masters out.")
    for side, tensor, axis in (("A", layer.A, 0), ("B", layer.B, 1)):
        master = masters.get(f"{layer.name}.lora_{side}.master")
        if master is None or master.shape[1 - axis] != tensor.shape[1 - axis]:
            raise ConversionError(f"{where}: holds no master of {layer.name}.lora_{side}. Leave --masters out.")
        pair.append(_in_front(master, tensor, axis))
    return Layer(layer.name, layer.scale, pair[0], pair[1])


def _in_front(master: LazyTensor, exported: LazyTensor, axis: int) -> LazyTensor:
    """The exported tensor with its first r rows or columns, which were trained, as the optimizer has them."""

    def read() -> torch.Tensor:
        trained = master.read()
        rest = exported.read().float().narrow(axis, trained.shape[axis], exported.shape[axis] - trained.shape[axis])
        return torch.cat([trained, rest], axis)

    return LazyTensor(torch.float32, exported.shape, read)


def table(rows: Sequence[dict[str, Any]], most: int = 12) -> str:
    """The layers that changed most, for people."""
    worst = sorted(rows, key=lambda row: -row["relative"])
    lines = [f"  {row['relative']:9.2e}  {row['error']:9.2e}  {row['layer']}" for row in worst[:most]]
    more = [f"  and {len(rows) - most} layers that changed less: {REPORT}"] if len(rows) > most else []
    return "\n".join(["   relative      error  layer (Frobenius norms of the change of its weight)", *lines, *more])
