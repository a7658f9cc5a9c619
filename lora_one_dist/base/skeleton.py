"""A model without values: built from its config.json, or refused.

In: the ``model`` group of a config.  Out: a transformers model on the meta device, from which everything that can be
refused is refused before a weight is read.
"""

from __future__ import annotations

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.core_model_loading import build_glob_alternation

from lora_one_dist.base.towers import auto_class, describes_encoder, drop_towers, model_class
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CAUSE_CHARACTERS = 300  # of others' errors that ours repeat


class ModelError(ValueError):
    """A model or a target list that cannot be trained: value, rule, remedy."""


def build_skeleton(config: ModelConfig, folder: Path) -> Any:
    """The model with parameters on the meta device.  Raises ModelError if config.json describes none to train."""
    _refuse_kind(config, folder)
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # each model checks its settings in its own way
        raise ModelError(
            f"model.path = {config.path}: its config.json is refused: {cause_of(error)}. Fetch it again, or correct it."
        ) from error
    if fp8_block(folder, config.path) is not None:
        del hf_config.quantization_config  # its values are dequantised while they are read
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: initialising a tensor without elements
            skeleton = model_class(hf_config).from_config(
                hf_config,
                dtype=DTYPES[config.dtype],
                attn_implementation=attention(config),
                trust_remote_code=config.trust_remote_code,
            )
    except Exception as error:
        raise ModelError(
            f"model.path = {config.path}: no model can be built from its config.json with attn_implementation "
            f"{config.attn_implementation}: {cause_of(error)}. Correct the file, or take another attn_implementation."
        ) from error
    skeleton.tie_weights()  # init_empty_weights gives every registered name a tensor of its own
    drop_towers(skeleton)
    _as_loaded(skeleton, DTYPES[config.dtype])
    return skeleton


def fp8_block(folder: Path, path: str) -> tuple[int, int] | None:
    """(rows, columns) of a block that shares a scale in a checkpoint of 8-bit floats; None: it holds whole values.

    Raises ModelError: it is quantised in another way.
    """
    asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not asked:
        return None
    method, block = asked.get("quant_method"), asked.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list | tuple) or len(block) != 2:
        raise ModelError(
            f"model.path = {path}: is quantised ({method}); its weights have no exact gradient here. Of quantised "
            "folders those of 8-bit floats with block scales are read (fp8, weight_block_size). Give the unquantised "
            "model."
        )
    return int(block[0]), int(block[1])


def _as_loaded(skeleton: Any, dtype: torch.dtype) -> None:
    """What ``from_pretrained`` does and ``from_config`` does not: computed buffers are computed in fp32, and the
    parameters that must stay in fp32 stay so."""
    for module in skeleton.modules():
        module._is_hf_initialized = False
    skeleton.initialize_weights()  # of tensors without values it does nothing
    kept = skeleton._get_dtype_plan(dtype)
    if not kept:
        return
    names, plan_of, _ = build_glob_alternation(list(kept))
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if found := names.search(name):
            tensor.data = tensor.data.to(kept[plan_of[str(found.lastgroup)]])


def attention(config: ModelConfig) -> str | None:
    """The attention to ask transformers for; None (auto): the best that the model's code has, sdpa or else eager."""
    return None if config.attn_implementation == "auto" else config.attn_implementation


def _refuse_kind(config: ModelConfig, folder: Path) -> None:
    """Raise ModelError if config.json is damaged, or names no language model that may be run here."""
    try:
        described = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            f"model.path = {config.path}: its config.json cannot be read: {error}. Fetch it again."
        ) from error
    kind, code = str(described.get("model_type")), described.get("auto_map")
    known = kind in CONFIG_MAPPING
    value = f"model.path = {config.path}: its model_type = {described.get('model_type')!r}"
    has_encoder = describes_encoder(described)
    trained = known and auto_class(kind, described.get("architectures"), has_encoder) is not None
    if isinstance(code, dict) and "AutoModelForCausalLM" in code and not trained:
        if not config.trust_remote_code:
            raise ModelError(
                f"{value} needs Python code that comes with it, which model.trust_remote_code = false does not run. "
                "Read the code, then set it to true; or take a model that transformers knows."
            )
        return
    if not known:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=1)
        hint = f"Did the file say {near[0]}? " if near else ""
        raise ModelError(f"{value} is none that transformers knows. {hint}Correct it, or update transformers.")
    if not trained:
        rule = "has an encoder that does not read text alone" if has_encoder else "has no causal language model"
        raise ModelError(
            f"{value} {rule} in transformers; what is trained here predicts the next token. Give a causal language "
            "model, or one whose encoder reads text (T5)."
        )


def cause_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:CAUSE_CHARACTERS].rstrip(".: ") or type(error).__name__


def local_folder(path: str, trust_remote_code: bool, allow_pickle: bool = False) -> Path:
    """The folder itself, or a hub name's snapshot, downloaded by the first rank of each host.  Collective."""
    if Path(path).is_dir():
        return Path(path)
    with comm.all_or_none("fetching the model"), comm.local_first():
        return _snapshot(path, trust_remote_code, allow_pickle)


def _snapshot(name: str, trust_remote_code: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:  # all of the hub's are one or the other
        raise ModelError(
            f"model.path = {name}: is no folder here, and cannot be fetched from the hub: {cause_of(error)}. Check the "
            "name, the network and your login, or give a folder."
        ) from error
    return folder
