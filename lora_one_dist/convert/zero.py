"""A DeepSpeed ZeRO checkpoint of a PEFT model as the PEFT folder of its adapter.

In: what HF Trainer, Accelerate or ``engine.save_checkpoint`` wrote at stage 1, 2 or 3 with any number of ranks.  Out: a
PEFT folder.  The values come from the optimizer's fp32 masters (:mod:`zero_checkpoint`), the only whole copy that every
stage keeps.  Peak memory: one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.adapters import peft_format, peft_settings
from lora_one_dist.adapters.peft_format import CONFIG, PREFIX
from lora_one_dist.convert import files
from lora_one_dist.convert.zero_checkpoint import Checkpoint, open_checkpoint
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, read_json


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, and what its user should know."""

    config: dict[str, Any]
    """Content of adapter_config.json."""
    tensors: dict[str, LazyTensor]
    beside: dict[str, Path]
    """The tokenizer's files and the chat template, by name."""
    notes: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def plan(
    folder: Path,
    tag: str | None = None,
    adapter_name: str | None = None,
    dtype: torch.dtype | None = None,
    adapter_config: Path | None = None,
    lora_alpha: float | None = None,
) -> Plan:
    """Find and check the adapter.  Reads no values.

    Args:
        folder: of the checkpoint: with a file ``latest``, or with the files of the ranks themselves.
        tag: which of several checkpoints; None takes what ``latest`` says.
        adapter_name: which of several adapters.
        dtype: to write in; None: what the model held.
        adapter_config: PEFT's file; None takes the one in the checkpoint's folder or above, or infers it.
        lora_alpha: needed where the configuration is inferred: no tensor tells it.

    Raises:
        ConversionError: if files are missing or of several saves, or do not fit the configuration.
    """
    opened = open_checkpoint(folder, tag, dtype)
    tensors, name = adapter_tensors(opened, adapter_name)
    config, source = _config(opened.folder, tensors, adapter_config, lora_alpha)
    around = (opened.folder, opened.folder.absolute().parent)  # HF Trainer saves its tokenizer above the ranks' files
    beside = next((found for found in map(files.tokenizer_files, around) if found), {})
    peft_format.check(config, tensors, str(opened.folder))
    notes = [
        f"{opened.folder}: ZeRO-{opened.stage} of {opened.world_size} ranks, step {opened.step}, adapter {name}",
        f"adapter_config.json: {source}",
    ]
    changed = peft_settings.changed_base(config)
    if changed is not None:
        notes.append(changed)
    if beside:
        notes.append(f"tokenizer: copied from {next(iter(beside.values())).parent}")
    return Plan(config, tensors, beside, notes)


def run(planned: Plan, out: Path) -> None:
    """Write the PEFT folder: new, whole or not there."""
    with files.new_folder(out, planned.num_bytes) as partial:
        progress = files.Progress("tensors", len(planned.tensors), planned.num_bytes)
        peft_format.write(partial, planned.config, planned.tensors, progress.add)
        files.copy(planned.beside, partial)
        progress.end()


def adapter_tensors(opened: Checkpoint, adapter_name: str | None = None) -> tuple[dict[str, LazyTensor], str]:
    """The tensors of one adapter by the names that PEFT gives them on disk, and the adapter's name."""
    found = {adapter for name in opened.tensors for adapter in peft_format.adapters_in(name)}
    if not found:
        raise ConversionError(
            f"{opened.folder}: nothing that was trained is of LoRA. Give a checkpoint of a PEFT model."
        )
    listed = ", ".join(sorted(found))
    if adapter_name is None and len(found) > 1:
        raise ConversionError(f"{opened.folder}: holds the adapters {listed}. Name one with --adapter_name.")
    if adapter_name is not None and adapter_name not in found:
        raise ConversionError(f"--adapter_name {adapter_name}: {opened.folder} holds {listed}. Name one of these.")
    chosen = adapter_name or found.pop()
    tensors = {}
    for name, tensor in opened.tensors.items():
        if peft_format.adapters_in(name) <= {chosen}:
            tensors[peft_format.name_on_disk(name)] = tensor
    return tensors, chosen


def _config(
    folder: Path, tensors: dict[str, LazyTensor], given: Path | None, lora_alpha: float | None
) -> tuple[dict[str, Any], str]:
    """Content of adapter_config.json, and where it is from."""
    if given is not None:
        return read_json(given), f"{given}, as given"
    for above in (folder, *list(folder.absolute().parents)[:2]):
        if (above / CONFIG).is_file():
            return read_json(above / CONFIG), f"{above / CONFIG}, as found"
    if lora_alpha is None:
        raise ConversionError(
            f"{folder}: there is no {CONFIG} in it or above. Give --adapter_config, or the --lora_alpha of "
            "the training."
        )
    if any(name.endswith(peft_format.TOKENS) for name in tensors):
        raise ConversionError(
            f"{folder}: there is no {CONFIG} in it or above, which alone tells which tokens were trained. Give "
            "--adapter_config."
        )
    return infer_config(tensors, lora_alpha), f"inferred from the tensors, with lora_alpha {lora_alpha} as given"


def infer_config(tensors: dict[str, LazyTensor], lora_alpha: float) -> dict[str, Any]:
    """What the names and shapes of an adapter's tensors tell of its configuration.  Pure.

    They do not tell rsLoRA, alpha_pattern, fan_in_fan_out or which tokens were trained: such an adapter needs its own
    file.
    """
    ranks, saved, biases = {}, set(), set()
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        part = peft_format.PARTS.fullmatch(bare)
        if part and part["part"] in ("lora_A.weight", "lora_embedding_A"):
            ranks[part["layer"]] = tensor.shape[0]
        elif bare.endswith(".bias"):
            biases.add("lora_bias" if part else "bias")
        elif not part:
            saved.add(bare.rpartition(".")[0].rpartition(".")[2])
    usual = max(ranks.values(), key=list(ranks.values()).count, default=0)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(ranks),
        "base_model_name_or_path": None,
        "r": usual,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "rank_pattern": {re.escape(layer): r for layer, r in ranks.items() if r != usual},
        "target_modules": peft_settings.target_modules({layer.rpartition(".")[2] for layer in ranks}, list(ranks)),
        "modules_to_save": sorted(saved) or None,
        "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        "lora_bias": "lora_bias" in biases,
        "bias": "all" if "bias" in biases else "none",
        "inference_mode": True,
    }


def _task_type(layers: Iterable[str]) -> str:
    """PEFT's name for the task: an encoder and a decoder side by side, or one stack."""
    stacks = {part for name in layers for part in name.split(".")} & {"encoder", "decoder"}
    return "SEQ_2_SEQ_LM" if len(stacks) == 2 else "CAUSAL_LM"
