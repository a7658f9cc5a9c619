"""PEFT's LoRA folders: which layer each tensor belongs to, at which scale, and what does not fit.

In: ``adapter_config.json`` and the tensors of ``adapter_model.safetensors``.  Out: an :class:`Adapter`, whose layers
say ``W + scale * B A`` (and DoRA's magnitude) with every shape checked.  Nothing of PEFT is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed, read_json, read_safetensors, write_safetensors

PREFIX = "base_model.model."  # of every name in a PEFT checkpoint
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "lm_head")  # saved when they were resized
# Of adapter_config.json: what is honoured here, and what only says how the adapter was made.
HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out"}
HONOURED |= {"modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "ensure_weight_tying"}
HISTORY = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
HISTORY |= {"lora_dropout", "init_lora_weights", "layers_pattern", "megatron_core", "loftq_config", "eva_config"}
HISTORY |= {"corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "tp_plan", "parent_library"}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that PEFT takes out of the base
PARTS = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|base_layer\.weight)"
)


@dataclass(frozen=True)
class Layer:
    """One adapted layer: ``W + scale * B A``, and with DoRA each row of that scaled to its magnitude."""

    name: str
    scale: float
    A: LazyTensor
    """(r, n); n is the vocabulary for an embedding."""
    B: LazyTensor
    """(m, r)."""
    magnitude: LazyTensor | None = None
    embedding: bool = False
    """An embedding's weight is (n, m), so what is added to it is the transpose of B A."""

    @property
    def r(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds."""

    where: str
    config: Mapping[str, Any]
    layers: dict[str, Layer] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    """Whole tensors of the base that were trained, by their names there: ``modules_to_save``."""


def open_folder(folder: Path) -> Adapter:
    """Read and check a PEFT folder.  Raises ConversionError, naming every problem found."""
    config, tensors = read(folder)
    return check(config, tensors, str(folder))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Configuration and tensors of a PEFT folder, not yet checked against each other."""
    if not (folder / CONFIG).is_file():
        raise ConversionError(f"{folder}: holds no {CONFIG}. Give the folder that PEFT's save_pretrained wrote.")
    if not (folder / WEIGHTS).is_file():
        held = (
            "only adapter_model.bin, a pickle, which may run code" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise ConversionError(
            f"{folder}: holds {held or 'no ' + WEIGHTS}. Load it where you trust it and save_pretrained it."
        )
    return read_json(folder / CONFIG), read_safetensors([folder / WEIGHTS])


def check(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> Adapter:
    """Put every tensor in its layer.

    Args:
        config: content of ``adapter_config.json``.
        tensors: by the names that PEFT gives them on disk.
        where: names the adapter in errors.

    Raises:
        ConversionError: naming every setting that is not supported, tensor that is missing or belongs nowhere, and
            shape that does not fit.
    """
    problems = _refused_settings(config)
    parts: dict[str, dict[str, LazyTensor]] = {}
    replaced: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        found = PARTS.fullmatch(bare)
        if bare == name:
            problems.append(f"{name} does not begin with {PREFIX}")
        elif found and found["part"] == "base_layer.weight":
            replaced[f"{found['layer']}.weight"] = tensor
        elif found:
            parts.setdefault(found["layer"], {})[found["part"].removesuffix(".weight")] = tensor
        elif _saved_whole(bare, config):
            replaced[bare] = tensor
        else:
            problems.append(f"{name} is neither of LoRA nor of modules_to_save")
    layers = {}
    if not problems:
        for layer_name, held in parts.items():
            layer = _layer(layer_name, held, config, problems)
            if layer is not None:
                layers[layer_name] = layer
    if not problems and not layers and not replaced:
        problems.append("it holds no LoRA tensors")
    if problems:
        raise ConversionError(f"{where}: {listed(problems, 5)}. Give a whole LoRA adapter whose {CONFIG} is its own.")
    return Adapter(where, config, layers, replaced)


def _refused_settings(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')}, must be LORA")
    if not _positive(config.get("r")) or not isinstance(config.get("lora_alpha"), int | float):
        problems.append(f"r is {config.get('r')} and lora_alpha {config.get('lora_alpha')}: both must be numbers")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {start}, which changed the base: the adapter does not hold on the one on disk (save "
            "it with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']}, must be none")
    for key in sorted(config.keys() - HONOURED - HISTORY - {"bias"}):
        if config[key]:
            problems.append(f"{key} is {config[key]}, which is not supported")
    return problems


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _saved_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Is it of a module that PEFT saves whole: of modules_to_save, or a resized embedding?"""
    module = name.rpartition(".")[0]
    listed = [*(config.get("modules_to_save") or []), *EMBEDDINGS]
    return any(f".{saved}." in f".{module}." for saved in listed)


def _layer(name: str, held: Mapping[str, LazyTensor], config: Mapping[str, Any], problems: list[str]) -> Layer | None:
    """A layer of its tensors, or None after adding to the problems."""
    embedding = "lora_embedding_A" in held or "lora_embedding_B" in held
    keys = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
    dora = bool(config.get("use_dora"))
    wanted = {*keys, *(["lora_magnitude_vector"] if dora else [])}
    r = rank_of(config, name)
    before = len(problems)
    for key in sorted(wanted ^ held.keys()):
        problems.append(f"{name} {'lacks' if key in wanted else 'has an unexpected'} {key}")
    if not is_target(config, name):
        problems.append(f"{name} is none of the target_modules {config.get('target_modules')}")
    if len(problems) == before:
        A, B = held[keys[0]], held[keys[1]]
        for key, tensor, axis in ((keys[0], A, 0), (keys[1], B, 1)):
            if len(tensor.shape) != 2 or tensor.shape[axis] != r:
                hint = " (saved without gathering ZeRO-3's partitions)" if 0 in tensor.shape else ""
                problems.append(f"{name}.{key} is {tensor.shape}, r is {r}{hint}")
    if len(problems) > before:
        return None
    return Layer(name, scale_of(config, name), A, B, held.get("lora_magnitude_vector"), embedding)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """r of a layer."""
    return _by_pattern(config.get("rank_pattern"), name, config["r"])


def scale_of(config: Mapping[str, Any], name: str) -> float:
    """alpha / r of a layer, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    r, alpha = rank_of(config, name), _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Does ``target_modules`` name this layer?  ``all-linear`` and an absent list name any."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a PEFT folder's two files into an existing folder, after the check of :func:`check`."""
    check(config, tensors, str(folder))
    write_config(folder, config)
    write_safetensors(folder / WEIGHTS, tensors, done)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``adapter_config.json`` as PEFT does."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
