"""Are two checkpoints the same?  Tensor by tensor, and by what the models compute.

In: any two of a Hugging Face model's folder, a PEFT folder, a run or checkpoint of ours, a ZeRO checkpoint of a PEFT
model, a Megatron-core checkpoint of a model or of Megatron-Bridge's adapters.  Out: the largest difference and where
it is.  Peak memory: a tensor of each; for logits, one model.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.adapters import peft_format
from lora_one_dist.convert import export, files, megatron_lora, megatron_model, zero, zero_checkpoint
from lora_one_dist.disk.lazy import ConversionError, LazyTensor

PART = 2**24  # elements compared at a time, in fp64


@dataclass(frozen=True)
class Opened:
    """A checkpoint of any format under the names of its Hugging Face model."""

    where: Path
    kind: str
    tensors: dict[str, LazyTensor]
    config: dict[str, Any] = field(default_factory=dict)
    """Of an adapter: content of adapter_config.json."""
    scales: dict[str, float] = field(default_factory=dict)
    """Of an adapter: what each layer's B A is multiplied by."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        return bool(self.config)


@dataclass(frozen=True)
class Difference:
    """Where two tensors of a name differ most."""

    name: str
    largest: float
    """Of the absolute differences; infinite where one of two numbers is no number."""
    index: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints differ in."""

    compared: int
    """Tensors that both have, in the same shape."""
    structure: list[str]
    """Names, shapes, types and scales that differ, in words."""
    differences: list[Difference]
    """Tensors whose values differ, the worst first."""

    def equal(self, tolerance: float = 0.0) -> bool:
        return not self.structure and all(d.largest <= tolerance for d in self.differences)


def open_any(
    path: Path, adapter_config: Path | None = None, lora_alpha: float | None = None, hf: Path | None = None
) -> Opened:
    """Recognise a checkpoint's format, check its hashes if it has any, and list its tensors.

    Args:
        adapter_config, lora_alpha: of a ZeRO checkpoint that has no adapter_config.json; see :func:`zero.plan`.
        hf: folder with the config.json of a Megatron checkpoint that has none.

    Raises:
        ConversionError: if it is of no known format, or broken.
    """
    wrong = files.wrong_checksums(path) if path.is_dir() else None
    if wrong:
        raise ConversionError(f"{path}: {wrong[0]} is not what {files.CHECKSUMS} says. Copy it again.")
    notes = [] if wrong is None else [f"{path}: every file has the hash of {files.CHECKSUMS}"]
    if zero_checkpoint.is_checkpoint(path):
        adapter = zero.plan(path, adapter_config=adapter_config, lora_alpha=lora_alpha)
        return _adapter(path, "ZeRO checkpoint", adapter.config, adapter.tensors, adapter.notes)
    if (path / "config.json").is_file() and not (path / peft_format.CONFIG).is_file():
        shards = files.model_shards(path)
        tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
        return Opened(path, "Hugging Face model", tensors, notes=notes)
    if megatron_lora.is_checkpoint(path):
        laid_out = megatron_lora.plan_to_peft(path, hf)
        return _adapter(path, "Megatron adapter", laid_out.adapter_config, laid_out.tensors, notes + laid_out.notes)
    if megatron_model.is_checkpoint(path):
        planned = megatron_model.plan_to_hf(path, hf)
        return Opened(path, "Megatron model", planned.tensors, notes=notes + planned.notes)
    folder, more = export.adapter_folder(path, step=None)
    config, tensors = peft_format.read(folder)
    return _adapter(folder, "adapter", config, tensors, notes + more)


def _adapter(
    where: Path, kind: str, config: dict[str, Any], tensors: dict[str, LazyTensor], notes: list[str]
) -> Opened:
    layers = peft_format.check(config, tensors, str(where)).layers
    bare = {name.removeprefix(peft_format.PREFIX): tensor for name, tensor in tensors.items()}
    return Opened(where, kind, bare, config, {name: layer.scale for name, layer in layers.items()}, notes)


def compare(first: Opened, second: Opened) -> Comparison:
    """Compare two checkpoints tensor by tensor.

    Raises:
        ConversionError: for an adapter and a whole model, which have no tensor in common.
    """
    if first.is_adapter != second.is_adapter:
        raise ConversionError(
            f"{first.where} is a {first.kind}, {second.where} a {second.kind}: compare two adapters or two models. "
            "Merge the adapter first (tools/merge_adapter.py)."
        )
    structure = [f"only {first.where} has {name}" for name in sorted(first.tensors.keys() - second.tensors.keys())]
    structure += [f"only {second.where} has {name}" for name in sorted(second.tensors.keys() - first.tensors.keys())]
    for name in sorted(first.scales.keys() & second.scales.keys()):
        if first.scales[name] != second.scales[name]:
            structure.append(f"the scale of {name} is {first.scales[name]:g} and {second.scales[name]:g}")
    both = [name for name in first.tensors if name in second.tensors]
    alike = [name for name in both if first.tensors[name].shape == second.tensors[name].shape]
    for name in both:
        x, y = first.tensors[name], second.tensors[name]
        if x.shape != y.shape:
            structure.append(f"{name} is {x.shape} and {y.shape}")
        elif x.dtype != y.dtype:
            structure.append(f"{name} is {x.dtype} and {y.dtype}")
    progress = files.Progress("tensors", len(alike), sum(first.tensors[name].num_bytes for name in alike))
    differences = []
    for name in alike:
        value, index = largest_difference(first.tensors[name].read(), second.tensors[name].read())
        progress.add(first.tensors[name].num_bytes)
        if value > 0:
            differences.append(Difference(name, value, index))
    progress.end()
    return Comparison(len(alike), structure, sorted(differences, key=lambda d: -d.largest))


def largest_difference(x: torch.Tensor, y: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest ``|x - y|``, taken in fp64, and its index.  Pure.

    The same number, also the same infinity or two NaNs, differs by 0; NaN and a number by infinity.
    """
    worst, position = 0.0, 0
    if x.dtype == y.dtype and torch.equal(x, y):
        return 0.0, ()
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for start in range(0, flat_x.numel(), PART):
        a, b = flat_x[start : start + PART].double(), flat_y[start : start + PART].double()
        distance = (a - b).abs()
        distance[(a == b) | (a.isnan() & b.isnan())] = 0.0
        distance = distance.nan_to_num(nan=math.inf, posinf=math.inf)
        at = int(distance.argmax())
        if distance[at] > worst:
            worst, position = float(distance[at]), start + at
    return worst, tuple(int(i) for i in torch.unravel_index(torch.tensor(position), x.shape)) if worst else ()


def logits(opened: Opened, base: Path | None, prompts: Sequence[str], dtype: torch.dtype) -> list[torch.Tensor]:
    """What a checkpoint's model computes for each prompt, (tokens, vocabulary) in fp32.

    Args:
        base: folder of the model below an adapter.

    Raises:
        ConversionError: for an adapter without a base.
    """
    if opened.kind == "Megatron model":
        raise ConversionError(
            f"{opened.where}: is Megatron's. Convert it with tools/megatron_to_hf.py to compare logits."
        )
    # Seconds to import: only where it is needed.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if opened.is_adapter and base is None:
        raise ConversionError(f"{opened.where}: is an adapter. Give its --base to compare logits.")
    folder = base if opened.is_adapter and base is not None else opened.where
    tokenizer = AutoTokenizer.from_pretrained(base or folder)
    if opened.is_adapter and files.tokenizer_files(opened.where).keys() - files.TEMPLATES:
        tokenizer = max(tokenizer, AutoTokenizer.from_pretrained(opened.where), key=len)  # new tokens
    of_two = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind: Any = AutoModelForSeq2SeqLM if of_two else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype)
    if opened.is_adapter:
        model = _adapted(model, opened)
    model.eval()
    with torch.no_grad():
        given = [dict(tokenizer(prompt, return_tensors="pt")) for prompt in prompts]
        if of_two:  # the decoder goes on with the prompt itself
            given = [{**one, "decoder_input_ids": one["input_ids"]} for one in given]
        return [model(**one).logits[0].float() for one in given]


def _adapted(model: Any, opened: Opened) -> Any:
    """The model with the adapter on it, loaded by PEFT from a folder as any user's."""
    from peft import PeftModel

    named = {peft_format.PREFIX + name: tensor for name, tensor in opened.tensors.items()}
    adapter, before = peft_format.check(opened.config, named, str(opened.where)), model.get_input_embeddings()
    rows = adapter.vocabulary or max((r.grown(before.num_embeddings) for r in adapter.rows.values()), default=0)
    if rows and rows != before.num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)  # as PEFT asks of its user; new rows are the adapter's
    with tempfile.TemporaryDirectory() as folder:
        peft_format.write(Path(folder), opened.config, named)
        return PeftModel.from_pretrained(model, folder)


def report(found: Comparison, tolerance: float, most: int = 10) -> list[str]:
    """The comparison in lines for people."""
    lines = found.structure[:most]
    if len(found.structure) > most:
        lines.append(f"and {len(found.structure) - most} more of these")
    for difference in found.differences[:most]:
        lines.append(f"{difference.largest:9.3g}  {difference.name}{list(difference.index)}")
    if len(found.differences) > most:
        lines.append(f"and {len(found.differences) - most} tensors that differ less")
    same = found.compared - len(found.differences)
    lines.append(f"{same} of {found.compared} tensors are equal bit for bit" if same else "no tensor is equal")
    if found.differences:
        worst = found.differences[0]
        lines.append(
            f"largest difference: {worst.largest:g} in {worst.name}{list(worst.index)}; tolerance {tolerance:g}"
        )
    return lines
