"""PEFT's LoRA adapters in Megatron-Bridge's layouts, and back.

In and out: a PEFT folder, and a distributed checkpoint that holds adapters only, as Bridge's ``checkpoint.load`` takes
it beside a converted base as ``checkpoint.pretrained_checkpoint``.  Bridge has two layouts:

* canonical (``CanonicalLoRA``): an adapter for each of q, k, v, gate and up, as in PEFT.  Nothing is lost either way.
* fused (``LoRA``): one adapter on ``linear_qkv`` and one on ``linear_fc1``, so that one A serves q, k and v.  From it
  B is split and A repeated, which is exact.  Into it: at the same rank where PEFT's A are equal, as they are after a
  split; else in blocks, A on A and B along a diagonal, at the sum of the ranks.  That computes the same, but has room
  to learn what the separate adapters had not.

Bridge has one rank and one alpha for all.  Smaller ranks and layers without an adapter are filled with zeros in both A
and B, which add nothing and get no gradient; going back, what is zero in both is left out.  Layouts as of
Megatron-Bridge 067f987.  Nothing of Megatron is imported.  Peak memory: one adapter of one layer.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_one_dist.adapters import peft_format
from lora_one_dist.convert import files, megatron, megatron_files, megatron_model
from lora_one_dist.convert.megatron import Geometry
from lora_one_dist.convert.megatron_blocks import MODULES, Blocks, Split, cut, groups_of, has_part, size_of
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed, read_json

CANONICAL, FUSED = "canonical", "fused"
CLASSES = {
    CANONICAL: "megatron.bridge.peft.canonical_lora.CanonicalLoRA",
    FUSED: "megatron.bridge.peft.lora.LoRA",
}
RUN_CONFIG = "run_config.yaml"
ADAPTER = re.compile(
    r"decoder\.layers\.(?P<layer>\d+)\.(?P<module>\w+\.\w+)\.adapter\.(?:(?P<part>adapter_\w+)\.)?"
    r"linear_(?P<side>in|out)\.weight"
)


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, and what its user should know."""

    hf: Path
    """Folder with the base's config.json."""
    tensors: dict[str, LazyTensor]
    adapter_config: dict[str, Any]
    notes: list[str]
    run_config: dict[str, Any] = field(default_factory=dict)
    """Of Bridge, on the way there."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def is_checkpoint(folder: Path) -> bool:
    """Is it a checkpoint of Megatron's that holds adapters?"""
    if not megatron_model.is_checkpoint(folder):
        return False
    return any(ADAPTER.fullmatch(name) for name in megatron_files.open_checkpoint(folder).tensors)


def plan_to_megatron(adapter: Path, base: Path, tp: int, pp: int, form: str = CANONICAL) -> Plan:
    """Check an adapter against its base's config.json and lay it out for Bridge.

    Args:
        base: folder of the Hugging Face model; only its config.json is read.
        tp, pp: sizes of the training that will load it.
        form: ``canonical`` or ``fused``; the latter reads every A once.

    Raises:
        ConversionError: for an adapter of another model, or of a kind that Bridge has not.
    """
    shape = megatron.geometry(read_json(base / "config.json"), str(base))
    megatron.check_parallel(shape, tp, pp)
    if form == CANONICAL and shape.ffn % (2 * tp):
        raise ConversionError(f"--tp {tp}: twice it does not divide the {shape.ffn} MLP rows. Give a smaller one.")
    opened = peft_format.open_folder(adapter)
    _refuse_misfits(opened, shape)
    used = {
        module: _adapters(parts, form)
        for module, parts in MODULES.items()
        if any(layer.endswith(f".{hf}") for layer in opened.layers for _, _, hf in parts)
    }
    scale = Counter(layer.scale for layer in opened.layers.values()).most_common(1)[0][0]
    blocks = {
        f"decoder.layers.{i}.{module}.adapter{'.' if part else ''}{part}": (
            module,
            Blocks([opened.layers.get(f"model.layers.{i}.{hf}") for hf in held], held, shape, scale),
        )
        for module, adapters in used.items()
        for i in range(shape.layers)
        for part, held in adapters.items()
    }
    needed = max(block.rank for _, block in blocks.values())
    rank = -(-needed // tp) * tp  # Bridge cuts A's rows over the tensor-parallel ranks
    dtype = functools.reduce(torch.promote_types, {t.dtype for x in opened.layers.values() for t in (x.A, x.B)})
    tensors: dict[str, LazyTensor] = {}
    for name, (module, block) in blocks.items():
        permute = tp if form == CANONICAL and module == "mlp.linear_fc1" else 1
        A, B = block.tensors(rank, dtype, permute)
        tensors |= {f"{name}.linear_in.weight": A, f"{name}.linear_out.weight": B}
    alpha, dropout = _number(scale * rank), opened.config.get("lora_dropout", 0.0)
    targets = [
        part for m in used for part in ([t for _, t, _ in MODULES[m]] if form == CANONICAL else [m.split(".")[1]])
    ]
    peft = {"_target_": CLASSES[form], "target_modules": targets, "dim": rank, "alpha": alpha, "dropout": dropout}
    notes = [f"{CLASSES[form].rpartition('.')[2]}(dim={rank}, alpha={alpha}, target_modules={targets})"]
    notes += _notes(opened, scale, rank, [block for _, block in blocks.values()])
    return Plan(base, tensors, dict(opened.config), notes, _run_config(peft, tp, pp))


def _run_config(peft: dict[str, Any], tp: int, pp: int) -> dict[str, Any]:
    return {
        "model": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
        "peft": peft,
    }


def run_to_megatron(planned: Plan, out: Path) -> None:
    """Write Megatron's folder: new, whole or not there."""
    tp = planned.run_config["model"]["tensor_model_parallel_size"]
    with files.new_folder(out, planned.num_bytes) as partial:
        release, hf = partial / megatron_model.RELEASE, partial / megatron_model.HF
        for folder in (release, hf):
            folder.mkdir()
        megatron_files.write(release, planned.tensors, lambda name: cut(name, tp), planned.run_config["model"])
        (release / RUN_CONFIG).write_text(yaml.safe_dump(planned.run_config, sort_keys=False), encoding="utf-8")
        (hf / "config.json").write_bytes((planned.hf / "config.json").read_bytes())
        peft_format.write_config(hf, planned.adapter_config)
        (partial / megatron_files.TRACKER).write_text(megatron_model.RELEASE, encoding="utf-8")


def plan_to_peft(checkpoint: Path, hf: Path | None = None) -> Plan:
    """Check a checkpoint of Bridge's adapters and name its tensors as PEFT does.  Reads every adapter once.

    Raises:
        ConversionError: if files are missing, the base is another one, or an adapter is of a kind that is not known.
    """
    opened = megatron_files.open_checkpoint(checkpoint)
    folder = megatron_model.hf_folder(checkpoint, opened, hf)
    shape = megatron.geometry(read_json(folder / "config.json"), str(folder))
    tp, scale = _training(opened)
    tensors: dict[str, LazyTensor] = {}
    ranks: dict[str, int] = {}
    adapters, left = _by_adapter(opened)
    for (i, module, part), (A, B) in adapters.items():
        hf_names = [hf_name for adapter, _, hf_name in MODULES[module] if part in ("", adapter)]
        sizes = [size_of(shape, name) for name in hf_names]
        wanted = ((A.shape[0], sizes[0][1]), (sum(rows for rows, _ in sizes), A.shape[0]))
        if (A.shape, B.shape) != wanted or not 0 <= i < shape.layers:
            raise ConversionError(
                f"{opened.folder}: layer {i}'s {module} {part} is {A.shape} and {B.shape}; {folder} says {wanted[0]} "
                f"and {wanted[1]} in each of {shape.layers} layers. Give --hf, the model that it was trained on."
            )
        permuted = tp if part and module == "mlp.linear_fc1" else 1
        split = Split(A, B, [rows for rows, _ in sizes], groups_of(shape, hf_names), permuted)
        for name, (part_A, part_B) in zip(hf_names, split.parts(), strict=True):
            if part_A.shape[0]:
                layer = f"model.layers.{i}.{name}"
                ranks[layer] = part_A.shape[0]
                tensors[f"{peft_format.PREFIX}{layer}.lora_A.weight"] = part_A
                tensors[f"{peft_format.PREFIX}{layer}.lora_B.weight"] = part_B
    if not tensors:
        raise ConversionError(f"{checkpoint}: every adapter in it is zero. There is nothing to convert.")
    notes = [f"{len(ranks)} layers have adapters, of rank {', '.join(map(str, sorted(set(ranks.values()))))}"]
    if left:
        notes.append(f"{left} tensors that are of no adapter are left out")
    config, note = _adapter_config(folder, tensors, ranks, scale)
    return Plan(folder, tensors, config, [*notes, note])


def run_to_peft(planned: Plan, out: Path) -> None:
    """Write a PEFT folder: new, whole or not there."""
    with files.new_folder(out, planned.num_bytes) as partial:
        progress = files.Progress("tensors", len(planned.tensors), planned.num_bytes)
        peft_format.write(partial, planned.adapter_config, planned.tensors, progress.add)
        progress.end()


def _adapters(parts: Sequence[tuple[str, str, str]], form: str) -> dict[str, list[str]]:
    """Bridge's adapters on a linear layer, and PEFT's layers in each."""
    return {part: [hf] for part, _, hf in parts} if form == CANONICAL else {"": [hf for _, _, hf in parts]}


def _refuse_misfits(opened: peft_format.Adapter, shape: Geometry) -> None:
    problems = opened.beyond_pairs()
    known = {f"model.layers.{i}.{hf}": hf for i in range(shape.layers) for ps in MODULES.values() for _, _, hf in ps}
    for name, layer in opened.layers.items():
        if name not in known:
            problems.append(f"{name} is no linear layer of this model's blocks")
        elif (layer.B.shape[0], layer.A.shape[1]) != size_of(shape, known[name]):
            found, wanted = (layer.B.shape[0], layer.A.shape[1]), size_of(shape, known[name])
            problems.append(f"{name} is on a layer of {found}, the model has {wanted}")
    if problems:
        raise ConversionError(
            f"{opened.where}: {listed(problems)}. Bridge's LoRA has no place for it: give --base, the model it "
            "was trained on, or merge it (tools/merge_adapter.py) and convert the model."
        )


def _notes(opened: peft_format.Adapter, scale: float, rank: int, blocks: Sequence[Blocks]) -> list[str]:
    notes = []
    changed = [name for name, layer in opened.layers.items() if layer.scale != scale]
    if changed:
        notes.append(
            f"Bridge has one alpha / dim, here {scale:g}: B of {len(changed)} layers is multiplied to make up for it, "
            f"the first {changed[0]}"
        )
    diagonal = sum(block.is_diagonal for block in blocks)
    if diagonal:
        notes.append(
            f"{diagonal} adapters share no A: laid out in blocks at dim {rank}. They compute the same but can learn "
            f"more; --form {CANONICAL} keeps them as they are"
        )
    filled = sum(layer is None for block in blocks for layer in block.layers)
    if filled:
        notes.append(f"{filled} layers without an adapter get one of zeros, which stays zero in training")
    return notes


def _training(opened: megatron_files.Checkpoint) -> tuple[int, float]:
    """Tensor-parallel size and alpha / dim of the training that wrote the checkpoint."""
    path = opened.folder / RUN_CONFIG
    if not path.is_file():
        raise ConversionError(f"{opened.folder}: has no {RUN_CONFIG}, which tells alpha. Give the whole checkpoint.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        peft = config["peft"]
        tp, alpha, dim = config["model"]["tensor_model_parallel_size"], peft["alpha"], peft["dim"]
        if not (isinstance(tp, int) and tp > 0 and alpha > 0 and dim > 0):
            raise ValueError(f"tp {tp}, alpha {alpha}, dim {dim}")
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path}: says no model.tensor_model_parallel_size, peft.dim and peft.alpha that make sense ({error}). "
            "Copy the checkpoint again."
        ) from error
    ranks = {tensor.shape[0] for name, tensor in opened.tensors.items() if name.endswith(".linear_in.weight")}
    if ranks - {dim}:
        raise ConversionError(
            f"{path}: peft.dim is {dim}, the adapters' is {sorted(ranks)}. Copy the checkpoint again."
        )
    return tp, alpha / dim


def _by_adapter(
    opened: megatron_files.Checkpoint,
) -> tuple[dict[tuple[int, str, str], tuple[LazyTensor, LazyTensor]], int]:
    """A and B by layer, module and part, in order; and how many tensors are of no adapter."""
    sides: dict[tuple[int, str, str], dict[str, LazyTensor]] = {}
    left = 0
    for name, tensor in opened.tensors.items():
        found = ADAPTER.fullmatch(name)
        known = found and found["module"] in MODULES and has_part(found["module"], found["part"] or "")
        if found and known:
            key = (int(found["layer"]), found["module"], found["part"] or "")
            sides.setdefault(key, {})[found["side"]] = tensor
        elif ".adapter." in name:
            raise ConversionError(
                f"{opened.folder}: {name} is of no adapter that PEFT has for these models. Only LoRA and CanonicalLoRA "
                "on attention and MLP can be converted."
            )
        else:
            left += 1
    if not sides:
        raise ConversionError(f"{opened.folder}: holds no adapters. For a model: tools/megatron_to_hf.py.")
    for (i, module, part), held in sides.items():
        if len(held) < 2:
            raise ConversionError(f"{opened.folder}: half of layer {i}'s {module} {part} is missing. Copy it again.")
    order = list(MODULES)
    keys = sorted(sides, key=lambda key: (key[0], order.index(key[1]), key[2]))
    return {key: (sides[key]["in"], sides[key]["out"]) for key in keys}, left


def _adapter_config(
    folder: Path, tensors: Mapping[str, LazyTensor], ranks: Mapping[str, int], scale: float
) -> tuple[dict[str, Any], str]:
    """The adapter_config.json that it was converted from, if that still fits, or one made of the tensors."""
    path = folder / peft_format.CONFIG
    original = read_json(path) if path.is_file() else {}
    if original:
        try:
            layers = list(peft_format.check(original, tensors, str(path)).layers.values())
        except ConversionError:  # of another shape by now
            layers = []
        if layers and all(abs(layer.scale / scale - 1) < 1e-12 for layer in layers):  # rounding of alpha / dim
            return original, f"adapter_config.json is {path}"
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    made = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": original.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(scale * r),
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": {name: _number(scale * rank) for name, rank in others.items()},
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "bias": "none",
    }
    return made, f"adapter_config.json is made: r {r}, lora_alpha {made['lora_alpha']}"


def _number(value: float) -> float:
    """A whole number where it is one: configurations are for people."""
    return int(value) if value == int(value) else value
