"""PEFT's LoRA folders: what each name that PEFT writes means, and what does not fit.

In: ``adapter_config.json`` and the tensors of ``adapter_model.safetensors``.  Out: an :class:`Adapter`, whose layers
say ``W + scale * B A`` (with DoRA's magnitude, and a bias), beside what was trained whole or for a few tokens, with
every shape checked.  Whoever takes adapters asks here what one holds.  Nothing of PEFT is imported.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one_dist.adapters import peft_settings
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed, read_safetensors, write_safetensors

PREFIX = "base_model.model."  # of every name in a PEFT checkpoint
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = "token_adapter.trainable_tokens_delta"
PARTS = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    rf"|lora_magnitude_vector(?:\.weight)?|{re.escape(TOKENS)})"
)
WRAPPER = re.compile(r"\.(modules_to_save|original_module|token_adapter\.base_layer|base_layer)(?=\.)")
IN_MODEL = re.compile(  # what the adapter's name follows in a live model
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta|modules_to_save)"
    r"\.(?P<adapter>[^.]+)"
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
    bias: LazyTensor | None = None
    """(m,), with ``lora_bias``: the layer's bias grows by scale times this."""
    parameter: str = "weight"
    """What of the layer is adapted; another than its weight by ``target_parameters`` alone."""

    @property
    def r(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that stand in place of the base's: ``trainable_token_indices``."""

    tokens: list[int]
    values: LazyTensor
    """(number of tokens, n)."""

    def grown(self, rows: int) -> int:
        """Rows of an embedding with so many once it has these: more where all behind its last are among them."""
        behind = {token for token in self.tokens if token >= rows}
        return rows + len(behind) if behind == set(range(rows, rows + len(behind))) else rows


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds."""

    where: str
    config: Mapping[str, Any]
    layers: dict[str, Layer] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    """Whole tensors, by their names in the base: ``modules_to_save``, ``bias``, embeddings that were resized."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """By the names of the base's embeddings."""

    @functools.cached_property
    def weights(self) -> dict[str, Layer]:
        """The layers by the names of what they are added to in the base."""
        return {f"{name}.{layer.parameter}": layer for name, layer in self.layers.items()}

    @functools.cached_property
    def biases(self) -> dict[str, Layer]:
        """The layers with ``lora_bias`` by the names of their biases in the base."""
        return {f"{name}.bias": layer for name, layer in self.layers.items() if layer.bias is not None}

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embeddings that it holds whole, or None if it holds none."""
        whole = (n for n in self.replaced if peft_settings.is_embedding(n.removesuffix(".weight")))
        return next((self.replaced[name].shape[0] for name in whole), None)

    def beyond_pairs(self) -> list[str]:
        """What it holds besides pairs A and B, in words, for those who take pairs alone."""
        words = ["it is a DoRA"] if self.config.get("use_dora") else []
        for name in self.replaced:
            trained = peft_settings.saved_whole(self.config, name.rpartition(".")[0])
            words.append(f"{name} was trained whole (modules_to_save)" if trained else f"{name} was saved whole")
        words += [f"tokens of {name} were trained (trainable_token_indices)" for name in self.rows]
        return words + [f"{name} was trained (lora_bias)" for name in self.biases]


@dataclass
class _Faults:
    """What is found to be wrong with a folder."""

    broken: list[str]
    """It was not saved whole, or its two files are of two adapters."""
    beyond: list[str]
    """PEFT does it, this package does not."""

    def __len__(self) -> int:
        return len(self.broken) + len(self.beyond)

    def tell(self, config: Mapping[str, Any], where: str) -> None:
        """Raise ConversionError if there are any."""
        if self.beyond:
            raise ConversionError(f"{where}: {listed(self.beyond, 5)}. {peft_settings.pefts_way(config)}")
        if self.broken:
            raise ConversionError(
                f"{where}: {listed(self.broken, 5)}. Give a whole LoRA adapter whose {CONFIG} is its own."
            )


def open_folder(folder: Path) -> Adapter:
    """Read and check a PEFT folder, for use on the base as it is on disk.

    Raises:
        ConversionError: naming every problem found; and for an adapter that holds on a changed base alone.
    """
    config, tensors = read(folder)
    opened = check(config, tensors, str(folder))
    changed = peft_settings.changed_base(config)
    if changed is not None:
        raise ConversionError(f"{folder}: {changed}")
    return opened


def read(folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Configuration and tensors of a PEFT folder, not yet checked against each other.

    Raises:
        ConversionError, WeightsError: for a missing or broken file.
    """
    if not (folder / CONFIG).is_file():
        raise ConversionError(f"{folder}: holds no {CONFIG}. Give the folder that PEFT's save_pretrained wrote.")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConversionError(f"{folder}: its {CONFIG} cannot be read: {error}. Copy it again.") from error
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = " (adapter_model.bin is a pickle, which may run code: load it where you trust it)" if pickled else ""
        raise ConversionError(f"{folder}: holds no {WEIGHTS}. Save it as such, with save_pretrained{hint}.")
    return config, read_safetensors([folder / WEIGHTS])


def check(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> Adapter:
    """Put every tensor in its place.

    Args:
        config: content of ``adapter_config.json``.
        tensors: by the names that PEFT gives them on disk.
        where: names the adapter in errors.

    Raises:
        ConversionError: naming every setting that is not supported, tensor that is missing or belongs nowhere, and
            shape that does not fit.
    """
    faults = _Faults(*peft_settings.refused(config))
    opened = Adapter(where, config)
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        found = PARTS.fullmatch(bare)
        if bare == name:
            faults.broken.append(f"{name} does not begin with {PREFIX}")
        elif found:
            parts.setdefault(found["layer"], {})[found["part"].removesuffix(".weight")] = tensor
        else:
            _add_whole(opened, bare, tensor, faults)
    faults.tell(config, where)
    for layer_name, held in parts.items():
        add = _add_rows if TOKENS in held else _add_layer
        add(opened, layer_name, held, faults)
    if not tensors:
        faults.broken.append("it holds no LoRA tensors")
    faults.tell(config, where)
    return opened


def _add_whole(opened: Adapter, name: str, tensor: LazyTensor, faults: _Faults) -> None:
    """A tensor that PEFT saved whole, under its name in the base: itself, a copy of it, or what it was before."""
    config, found = opened.config, WRAPPER.search(name)
    wrapper, plain = found[1] if found else "", WRAPPER.sub("", name)
    module, _, kind = plain.rpartition(".")
    bias = kind == "bias" and config.get("bias", "none") != "none"
    known = bias or peft_settings.is_embedding(module) or peft_settings.saved_whole(config, module)
    if not known and wrapper != "base_layer":
        faults.broken.append(f"{name} is neither of LoRA nor of modules_to_save")
    elif wrapper == "modules_to_save":
        opened.replaced.setdefault(plain, tensor)  # where the vocabulary was resized, PEFT writes it twice
    elif wrapper != "original_module":
        opened.replaced[plain] = tensor


def _add_rows(opened: Adapter, name: str, held: Mapping[str, LazyTensor], faults: _Faults) -> None:
    """The trained tokens of an embedding."""
    tokens, values = peft_settings.tokens_of(opened.config, name), held[TOKENS]
    if tokens is None:
        told = opened.config.get("trainable_token_indices")
        faults.broken.append(f"trainable_token_indices is {told}, must be token numbers")
    elif len(held) > 1 or len(values.shape) != 2 or values.shape[0] != len(tokens):
        faults.broken.append(f"{name}.{TOKENS} is {values.shape}, trainable_token_indices names {len(tokens)} tokens")
    else:
        opened.rows[f"{name}.weight"] = Rows(tokens, values)


def _add_layer(opened: Adapter, name: str, held: Mapping[str, LazyTensor], faults: _Faults) -> None:
    """A layer of its tensors."""
    config, before = opened.config, len(faults)
    embedding = "lora_embedding_A" in held or "lora_embedding_B" in held
    keys = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
    wanted = set(keys)
    wanted |= {"lora_magnitude_vector"} if config.get("use_dora") else set()
    wanted |= {"lora_B.bias"} if config.get("lora_bias") and not embedding else set()
    for key in sorted(wanted ^ held.keys()):
        faults.broken.append(f"{name} {'lacks' if key in wanted else 'has an unexpected'} {key}")
    module = name.removesuffix(".base_layer")
    parameters = peft_settings.parameters_of(config, module)
    if not parameters:
        also = f" and target_parameters {config['target_parameters']}" if config.get("target_parameters") else ""
        faults.broken.append(f"{name} is none of the target_modules {config.get('target_modules')}{also}")
    elif len(parameters) > 1 or module != name:
        faults.beyond.append(f"{module} is adapted in several parameters: target_parameters {parameters}")
    if len(faults) > before:
        return
    adapted = peft_settings.adapted(config, name, parameters[0]) or name
    r, A, B = peft_settings.rank_of(config, adapted), held[keys[0]], held[keys[1]]
    for key, tensor, axis in ((keys[0], A, 0), (keys[1], B, 1)):
        _check_rank(f"{name}.{key}", tensor, axis, r, adapted != name, faults)
    if len(faults) == before:
        magnitude, bias = held.get("lora_magnitude_vector"), held.get("lora_B.bias")
        scale = peft_settings.scale_of(config, adapted)
        opened.layers[name] = Layer(name, scale, A, B, magnitude, embedding, bias, parameters[0])


def _check_rank(name: str, tensor: LazyTensor, axis: int, r: int, parameter: bool, faults: _Faults) -> None:
    """One of a pair: r is the size of ``axis``, or that of each matrix of a ``parameter`` with three dimensions."""
    if len(tensor.shape) == 2 and tensor.shape[axis] == r:
        return
    if parameter and len(tensor.shape) == 2 and tensor.shape[axis] and tensor.shape[axis] % r == 0:
        faults.beyond.append(f"{name} is {tensor.shape}, r is {r}: target_parameters of more than 2 dimensions")
        return
    hint = " (saved without gathering ZeRO-3's partitions)" if 0 in tensor.shape else ""
    faults.broken.append(f"{name} is {tensor.shape}, r is {r}{hint}")


def adapters_in(name: str) -> set[str]:
    """The adapters that the name of a live model's tensor names: one, or none where it belongs to all (a bias)."""
    return {match["adapter"] for match in IN_MODEL.finditer(name)}


def name_on_disk(name: str) -> str:
    """What PEFT calls a tensor of a live model on disk: no wrappers in front, no adapter's name, no copy's module."""
    start = name.find(PREFIX)
    bare = name[start:] if start > 0 else name
    bare = IN_MODEL.sub(lambda match: "" if match[1] == "modules_to_save" else f".{match[1]}", bare)
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", bare)


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
