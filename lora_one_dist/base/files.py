"""The files of a base model: which they are, and whether they fit the model.

In: a folder and a skeleton (:mod:`skeleton`).  Out: paths, or the reason why the files are refused.  Reads headers and
no values; not collective.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from lora_one_dist.base.skeleton import DTYPES, ModelError, cause_of
from lora_one_dist.config.settings import ModelConfig
from lora_one_dist.disk import weights


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one base from another: config.json, and names, shapes and a sample of its weights.  Not collective.

    The name of the transformers version that wrote the config is no part of it.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return {"config": digest, **weights.fingerprint(weight_files(folder, allow_pickle=True))}


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files with the base's values: safetensors, or pytorch_model*.bin if there are none and they are allowed.

    Raises:
        ModelError: if there are none, only pickles that are not allowed, or an index names a missing file.
    """
    names = ["model.safetensors", "pytorch_model.bin"]
    there = [name for name in names if (folder / name).is_file() or (folder / f"{name}.index.json").is_file()]
    if there == names[1:] and not allow_pickle:
        raise ModelError(
            f"model.path = {folder}: its weights are in {there[0]} only, a pickle, which may run code when it is read. "
            "Convert it (save_pretrained writes safetensors), or set model.allow_pickle: true to read its tensors."
        )
    name = there[0] if there else names[0]
    index = folder / f"{name}.index.json"
    paths = _indexed(folder, index) if index.is_file() else [folder / name]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(
            f"model.path = {folder}: {', '.join(missing)} missing. Give a folder with all of its *.safetensors "
            "(save_pretrained writes them; other formats are not read, pytorch_model.bin with model.allow_pickle)."
        )
    return paths


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
        paths = sorted({folder / name for name in described["weight_map"].values()})
        described["metadata"]  # from_pretrained asks for it
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"model.path = {folder}: its {index.name} has no weight_map and metadata that can be read: "
            f"{cause_of(error)}. Fetch it again."
        ) from error
    if not paths:
        raise ModelError(f"model.path = {folder}: the weight_map of its {index.name} is empty. Fetch it again.")
    return paths


def refuse_unfit(config: ModelConfig, skeleton: Any, files: Sequence[Path]) -> None:
    """Raise ModelError if ``from_pretrained`` would find no values, or others than fit, for some tensor.

    It is asked itself, with tensors that have shapes and no values: it alone knows what it renames and fuses.
    """
    state: dict[str, torch.Tensor] = {}
    for path in files:
        state |= _shapes(path)
    shown, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _, report = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            device_map={"": "meta"},
            dtype=DTYPES[config.dtype],
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(shown)
        if bars:
            transformers_logging.enable_progress_bar()
    refuse_missing(config, report)
    misfits = sorted(report["mismatched_keys"])
    if misfits:
        name, stored, wanted = misfits[0]
        raise ModelError(
            f"model.path = {config.path}: its files hold {len(misfits)} tensors of another shape, e.g. {name} "
            f"{tuple(stored)}, which config.json makes {tuple(wanted)}. Give weights and config.json of one model."
        )


def refuse_missing(config: ModelConfig, report: Mapping[str, Any]) -> None:
    """Raise ModelError if a loading report of transformers names tensors without values."""
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers fills them with random values and a warning
        raise ModelError(
            f"model.path = {config.path}: its files hold no values for {len(lacking)} tensors, e.g. {lacking[0]}. "
            "Give a complete checkpoint of the causal language model."
        )


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device.  Reads no values, and runs nothing that a pickle holds."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as reader:
            shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refers to {code[1]}, must hold nothing but tensors" if code else f"cannot be read ({cause_of(error)})"
        raise ModelError(f"{path}: {what}. Fetch it again from whom you trust, better as safetensors.") from error
    if not (isinstance(held, dict) and all(isinstance(tensor, torch.Tensor) for tensor in held.values())):
        raise ModelError(f"{path}: holds no mapping of names to tensors. Convert it with save_pretrained.")
    return {name: tensor.to("meta") for name, tensor in held.items()}
