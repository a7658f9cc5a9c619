"""An adapter merged into its base, tensor by tensor.

In: a Hugging Face model's folder and a PEFT folder.  Out: the same files with ``W + scale * B A`` in place of ``W``,
added in fp32 and rounded once to the type of the base; what the adapter trained whole, and its tokenizer, in place of
the base's.  Peak memory for each worker: one tensor in fp32, its delta in fp32 and one layer's A and B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.adapters import peft_format, peft_settings
from lora_one_dist.adapters.peft_format import Adapter, Layer, Rows
from lora_one_dist.convert import files, vocabulary
from lora_one_dist.convert.names import names_in_files
from lora_one_dist.convert.vocabulary import Shards
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed, read_json
from lora_one_dist.disk.weights import beside_weights


@dataclass(frozen=True)
class Plan:
    """What a merge will write, and what its user should know."""

    beside: dict[str, Path]
    """What is copied as it is, by name: tokenizer, chat template, licence."""
    shards: Shards
    config: dict[str, Any]
    """Content of config.json."""
    notes: list[str]


def plan(base: Path, adapter: Path, device: torch.device | str = "cpu") -> Plan:
    """Put every tensor of the adapter in its place in the base.  Reads no values.

    Args:
        device: where products and sums are taken.

    Raises:
        ConversionError: if the adapter is of another model, incomplete, or of a kind that cannot be merged; naming the
            layers.
    """
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise ConversionError(f"{base}: is quantised. Merge into the unquantised model, and quantise what comes out.")
    shards = files.model_shards(base)
    opened = peft_format.open_folder(adapter)
    notes = [f"{len(opened.layers)} layers of rank {_ranks(opened)} are added"]
    opened = _under_names_of(base, shards, opened, notes)
    if opened.replaced:
        notes.append(f"replaced whole: {', '.join(sorted(opened.replaced))}")
    notes += [f"rows of {len(rows.tokens)} tokens are replaced in {name}" for name, rows in opened.rows.items()]
    shards, config = vocabulary.untie(shards, config, opened, notes)
    config = vocabulary.resize(str(base), shards, config, opened, notes)
    _refuse_other_model(base, shards, opened)
    _refuse_lost_biases(shards, opened)
    merged = {
        file: {name: _merged(name, tensor, opened, device) for name, tensor in tensors.items()}
        for file, tensors in shards.items()
    }
    beside = _beside(base, adapter, notes)
    if "tokenizer.json" in beside and beside["tokenizer.json"].parent == adapter:
        vocabulary.refuse_longer_tokenizer(adapter, shards, opened)
    return Plan(beside, merged, config, notes)


def run(planned: Plan, out: Path, workers: int = 1) -> None:
    """Write the merged model: a new folder, whole or not there."""
    with files.new_folder(out, files.num_bytes(planned.shards)) as partial:
        files.copy(planned.beside, partial)
        (partial / "config.json").write_text(json.dumps(planned.config, indent=2) + "\n", encoding="utf-8")
        files.write_model(partial, planned.shards, workers)


def _beside(base: Path, adapter: Path, notes: list[str]) -> dict[str, Path]:
    """What stands beside the base's weights, with the adapter's tokenizer and chat template where they are others."""
    beside, own = beside_weights(base), files.tokenizer_files(adapter)
    if all(name in beside and beside[name].read_bytes() == path.read_bytes() for name, path in own.items()):
        return beside
    whole = not own.keys() <= files.TEMPLATES  # its vocabulary too: no file of the base's must stay beside it
    replaced = files.tokenizer_files(base).keys() if whole else own.keys()
    kept = {name: path for name, path in beside.items() if name not in replaced}
    notes.append(f"taken from the adapter, as the base's differ: {', '.join(sorted(own))}")
    return kept | own


def merged_weight(weight: torch.Tensor, layer: Layer, transposed: bool, device: torch.device | str) -> torch.Tensor:
    """``W + scale * B A``, or DoRA's ``m (W + scale * B A) / ||W + scale * B A||`` by rows (arXiv 2402.09353, eq. 5).

    Args:
        weight: (m, n), or (n, m) if transposed; is overwritten if it is fp32 on ``device``.
        transposed: the weight is stored as (n, m), as Conv1D and embeddings do.

    Returns:
        the sum in fp32 (fp64 for an fp64 weight), rounded once to the type of ``weight``, on the host.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    dtype, total = weight.dtype, weight.to(device, exact)
    del weight
    delta = layer.B.read().to(device, exact) @ layer.A.read().to(device, exact)
    total += (delta.T if transposed else delta).mul_(layer.scale)
    del delta
    if layer.magnitude is not None:
        rows = total.T if transposed else total  # a view: out_features first
        rows *= (layer.magnitude.read().to(device, exact) / torch.linalg.norm(rows, dim=1)).view(-1, 1)
    return total.to(dtype).cpu()


def merged_bias(bias: torch.Tensor, layer: Layer) -> torch.Tensor:
    """``b + scale * b'`` for a layer with ``lora_bias``; fp32 as :func:`merged_weight`, rounded once."""
    assert layer.bias is not None, layer.name
    exact = torch.promote_types(bias.dtype, torch.float32)
    return (bias.to(exact) + layer.scale * layer.bias.read().to(exact)).to(bias.dtype)


def _merged(name: str, base: LazyTensor, adapter: Adapter, device: torch.device | str) -> LazyTensor:
    """A tensor of the base as it is after the merge."""
    tensor = _replaced(name, base, adapter)
    layer, biased, rows = adapter.weights.get(name), adapter.biases.get(name), adapter.rows.get(name)
    if layer is not None:
        transposed = bool(_transposed(tensor.shape, layer, adapter))
        return LazyTensor(base.dtype, tensor.shape, lambda: merged_weight(tensor.read(), layer, transposed, device))
    if biased is not None:
        return LazyTensor(base.dtype, tensor.shape, lambda: merged_bias(tensor.read(), biased))
    if rows is not None:
        shape = (rows.grown(tensor.shape[0]), *tensor.shape[1:])
        return LazyTensor(base.dtype, shape, lambda: _with_rows(tensor.read(), rows))
    return tensor


def _replaced(name: str, base: LazyTensor, adapter: Adapter) -> LazyTensor:
    """A tensor of the base, or what the adapter has in place of it, in the type of the base."""
    whole = adapter.replaced.get(name)
    if whole is None:
        return base
    return LazyTensor(base.dtype, whole.shape, lambda: whole.read().to(base.dtype))


def _with_rows(weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    more = rows.grown(weight.shape[0]) - weight.shape[0]
    weight = torch.cat([weight, weight.new_empty(more, *weight.shape[1:])]) if more else weight
    weight[rows.tokens] = rows.values.read().to(weight.dtype)
    return weight


def _transposed(shape: tuple[int, ...], layer: Layer, adapter: Adapter) -> bool | None:
    """Is a weight of this shape stored as (n, m)?  None if the layer fits it neither way."""
    m, n = layer.B.shape[0], layer.A.shape[1]
    fits = {False: shape == (m, n), True: shape == (n, m)}
    if layer.embedding:
        return True if fits[True] else None
    if m == n and fits[True]:
        return bool(adapter.config.get("fan_in_fan_out"))
    return next((transposed for transposed, fit in fits.items() if fit), None)


def _ranks(adapter: Adapter) -> str:
    return ", ".join(map(str, sorted({layer.r for layer in adapter.layers.values()}))) or "none"


def _under_names_of(base: Path, shards: Shards, adapter: Adapter, notes: list[str]) -> Adapter:
    """The adapter under the names that the base's files have, where transformers gives their tensors others."""
    wanted = {*adapter.weights, *adapter.replaced, *adapter.rows}
    if wanted <= {name for tensors in shards.values() for name in tensors}:
        return adapter
    names = names_in_files(base)
    others = sorted(name for name in wanted if names.get(name, name) != name)
    if not others:
        return adapter  # what is missing is named below
    notes.append(f"{len(others)} tensors have other names in the base's files: {others[0]} is {names[others[0]]}, ...")
    layers = {_layer_in_files(name, layer, names): layer for name, layer in adapter.layers.items()}
    replaced = {names.get(name, name): tensor for name, tensor in adapter.replaced.items()}
    rows = {names.get(name, name): value for name, value in adapter.rows.items()}
    return Adapter(adapter.where, adapter.config, layers, replaced, rows)


def _layer_in_files(name: str, layer: Layer, names: Mapping[str, str]) -> str:
    weight = f"{name}.{layer.parameter}"
    return names.get(weight, weight).removesuffix(f".{layer.parameter}")


def _refuse_other_model(base: Path, shards: Shards, adapter: Adapter) -> None:
    """Raise ConversionError unless every tensor of the adapter finds its own, and every target its layer."""
    stored = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    shapes = {name: _replaced(name, tensor, adapter).shape for name, tensor in stored.items()}
    needed = [*adapter.weights, *adapter.replaced, *adapter.rows]
    problems = [f"it has no {name}" for name in dict.fromkeys(needed) if name not in stored]
    for name, whole in adapter.replaced.items():
        before = stored[name].shape if name in stored else whole.shape
        if before != whole.shape and not vocabulary.is_resized(name, before, whole.shape):
            problems.append(f"{name} is {before}, the adapter's {whole.shape} (resize the base first)")
    for name in adapter.weights.keys() & shapes.keys():
        problems += _layer_misfits(name, shapes[name], adapter)
    for name in adapter.rows.keys() & shapes.keys():
        last, values = max(adapter.rows[name].tokens, default=0), adapter.rows[name].values
        if last >= adapter.rows[name].grown(shapes[name][0]) or values.shape[1:] != shapes[name][1:]:
            trained = f"the adapter's rows {values.shape} of tokens up to {last}"
            problems.append(f"{name} is {shapes[name]}, {trained} (resize the base first)")
    if not problems:
        problems = [f"the adapter targets {name} and holds nothing for it" for name in _left_out(stored, adapter)]
    if problems:
        raise ConversionError(
            f"{base}: is not the base of {adapter.where}: {listed(problems)}. Give the base it was trained on "
            f"({adapter.config.get('base_model_name_or_path')})."
        )


def _layer_misfits(name: str, shape: tuple[int, ...], adapter: Adapter) -> list[str]:
    layer = adapter.weights[name]
    m, n = layer.B.shape[0], layer.A.shape[1]
    if _transposed(shape, layer, adapter) is None:
        return [f"{name} is {shape}, the adapter's B A {(m, n)}"]
    if layer.magnitude is not None and layer.magnitude.shape != (m,):
        return [f"the magnitudes of {layer.name} are {layer.magnitude.shape}, must be {(m,)}"]
    if layer.bias is not None and layer.bias.shape != (m,):
        return [f"the bias of {layer.name} is {layer.bias.shape}, must be {(m,)}"]
    return []


def _left_out(stored: Mapping[str, LazyTensor], adapter: Adapter) -> list[str]:
    """Layers that the configuration names and the adapter lacks: it was not saved whole."""
    config = adapter.config
    partly = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    if partly or config.get("target_modules") in (None, "all-linear") or not adapter.layers:
        return []
    names = [name.rpartition(".") for name, tensor in stored.items() if len(tensor.shape) == 2]
    left = [(m, p) for m, _, p in names if f"{m}.{p}" not in adapter.weights and peft_settings.adapted(config, m, p)]
    return [module if parameter == "weight" else f"{module}.{parameter}" for module, parameter in left]


def _refuse_lost_biases(shards: Shards, adapter: Adapter) -> None:
    """Raise ConversionError for ``lora_bias`` that no bias of the base can take."""
    held = {name for tensors in shards.values() for name in tensors}
    lacking = [name for name in adapter.biases if name not in held]
    if lacking:
        raise ConversionError(
            f"{adapter.where}: lora_bias is true, and the base has no {listed(lacking)}: it cannot be merged, by PEFT "
            f"neither. Serve it unmerged: {peft_settings.LIVE}."
        )
