"""Llama 2/3, Mistral, Qwen2 and Qwen3 under Hugging Face's and under Megatron-core's names and layouts.

In and out: mappings of names to :class:`LazyTensor`, every tensor whole.  How Megatron cuts them over ranks is a matter
of the files (:mod:`megatron_files`).  Layouts, as of megatron-core 0.16: ``linear_qkv`` holds for each group of heads
its queries, then its key, then its value; ``linear_fc1`` the rows of the gate, then of ``up``; zeros pad the
vocabulary.  Nothing of Megatron is imported.  Peak memory: one fused tensor and its parts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "llama3")  # that Megatron-core has
EMBEDDING, HEAD, NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
HF_EMBEDDING, HF_HEAD, HF_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# One tensor of a layer in each: Megatron's name, Hugging Face's.
SAME = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
QKV = [f"self_attn.{side}_proj" for side in "qkv"]
FC1 = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # of old checkpoints; computed today


@dataclass(frozen=True)
class Geometry:
    """What the shapes of a model follow from."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    """Of heads that share a key and a value: num_key_value_heads."""
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool


def geometry(config: Mapping[str, Any], where: str) -> Geometry:
    """Of the content of a config.json.

    Raises:
        ConversionError: for a family or a setting that Megatron-core's GPTModel would compute otherwise.
    """
    family = config.get("model_type")
    problems = []
    if family not in FAMILIES:
        problems.append(f"model_type is {family}, must be one of {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {config['hidden_act']}, must be silu")
    for key in ("mlp_bias", "quantization_config", *(["attention_bias"] if family != "qwen2" else [])):
        if config.get(key):
            problems.append(f"{key} is {config[key]}, which is not supported")
    rope = rope_type(config)
    if rope not in ROPE_TYPES:
        problems.append(f"its rope_type is {rope}, must be one of {', '.join(ROPE_TYPES)}")
    if problems:
        raise ConversionError(f"{where}: {'; '.join(problems)}. Only these models can be converted.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Geometry(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def rope_type(config: Mapping[str, Any]) -> str:
    """The kind of rotary embedding, under the names of any version of transformers."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type") or "default"


def check_parallel(shape: Geometry, tp: int, pp: int) -> None:
    """Raise ConversionError unless tensor- and pipeline-parallel sizes divide what they cut."""
    for name, value in (("heads", shape.heads), ("key/value heads", shape.groups), ("MLP rows", shape.ffn)):
        if value % tp:
            raise ConversionError(f"--tp {tp}: does not divide the {value} {name}. Give a divisor.")
    if shape.layers % pp:
        raise ConversionError(f"--pp {pp}: does not divide the {shape.layers} layers. Give a divisor.")


def padded_vocabulary(vocabulary: int, multiple: int) -> int:
    """Rows of the embedding: the next multiple of ``make_vocab_size_divisible_by`` times the tensor-parallel size."""
    return -(-vocabulary // multiple) * multiple


def pieces(name: str, tp: int) -> tuple[int, int]:
    """Axis along which ranks cut a tensor, and the number of equal pieces; gate and up are each cut over all ranks."""
    if name in (EMBEDDING, HEAD) or ".linear_qkv.weight" in name or ".linear_qkv.bias" in name:
        return 0, tp
    if name.endswith("linear_fc1.weight"):
        return 0, 2 * tp
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1, tp
    return 0, 1


def shapes(shape: Geometry, rows: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of Megatron's model, with ``rows`` rows in the padded vocabulary."""
    q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, shape.hidden)}
    for i in range(shape.layers):
        layer = {
            "self_attention.linear_qkv.layer_norm_weight": (shape.hidden,),
            "self_attention.linear_qkv.weight": (q + 2 * kv, shape.hidden),
            **({"self_attention.linear_qkv.bias": (q + 2 * kv,)} if shape.qkv_bias else {}),
            **({name: (shape.head_dim,) for name in QK_NORMS} if shape.qk_norm else {}),
            "self_attention.linear_proj.weight": (shape.hidden, q),
            "mlp.linear_fc1.layer_norm_weight": (shape.hidden,),
            "mlp.linear_fc1.weight": (2 * shape.ffn, shape.hidden),
            "mlp.linear_fc2.weight": (shape.hidden, shape.ffn),
        }
        found |= {f"decoder.layers.{i}.{name}": size for name, size in layer.items()}
    return found | {NORM: (shape.hidden,)} | ({} if shape.tied else {HEAD: (rows, shape.hidden)})


def to_megatron(
    tensors: Mapping[str, LazyTensor], shape: Geometry, rows: int, where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """A Hugging Face model's tensors as Megatron's, and what its user should know.

    Args:
        rows: of the padded vocabulary.

    Raises:
        ConversionError: naming what is missing, belongs nowhere, or has another shape than the config says.
    """
    used: set[str] = set()

    def take(name: str) -> LazyTensor:
        if name not in tensors:
            raise ConversionError(f"{where}: has no {name}, which its config.json asks for. Fetch the model again.")
        used.add(name)
        return tensors[name]

    made = {NORM: take(HF_NORM)}
    for name, hf in {EMBEDDING: HF_EMBEDDING, **({} if shape.tied else {HEAD: HF_HEAD})}.items():
        if take(hf).shape[0] != shape.vocabulary:
            raise ConversionError(
                f"{where}: {hf} has {take(hf).shape[0]} rows, config.json says vocab_size {shape.vocabulary}. Give the "
                "config of this model."
            )
        made[name] = _padded(take(hf), rows)
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for name, hf in (SAME | (QK_NORMS if shape.qk_norm else {})).items():
            made[ours + name] = take(theirs + hf)
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            parts = [take(f"{theirs}{name}.{kind}") for name in QKV]
            made[f"{ours}self_attention.linear_qkv.{kind}"] = _joined(parts, shape.groups)
        made[ours + "mlp.linear_fc1.weight"] = _joined([take(theirs + name) for name in FC1], 1)
    notes = []
    left = tensors.keys() - used
    if shape.tied and HF_HEAD in left:
        left.remove(HF_HEAD)
        notes.append(f"{HF_HEAD} is left out: config.json ties it to {HF_EMBEDDING}")
    buffers = {name for name in left if BUFFERS.fullmatch(name)}
    if buffers:
        notes.append(f"{len(buffers)} rotary_emb.inv_freq are left out: they are computed")
    if left - buffers:
        raise ConversionError(
            f"{where}: {sorted(left - buffers)[0]} has no place in Megatron's model. Give a model without it."
        )
    _refuse_other_shapes(made, shapes(shape, rows), where)
    return {name: made[name] for name in shapes(shape, rows)}, notes


def to_hf(tensors: Mapping[str, LazyTensor], shape: Geometry, where: str) -> dict[str, LazyTensor]:
    """A Megatron model's tensors as Hugging Face's.  The padding of the vocabulary is cut off.

    Raises:
        ConversionError: if the tensors are not those of the config.
    """
    if EMBEDDING not in tensors:
        raise ConversionError(f"{where}: has no {EMBEDDING}: is no GPT model. Give one of Megatron-core.")
    rows = tensors[EMBEDDING].shape[0]
    if rows < shape.vocabulary:
        raise ConversionError(
            f"{where}: its vocabulary has {rows} rows, config.json says {shape.vocabulary}. Give the "
            "config of this model."
        )
    _refuse_other_shapes(tensors, shapes(shape, rows), where)

    @functools.lru_cache(maxsize=1)  # the parts of a fused tensor are asked for one after the other
    def whole(name: str) -> torch.Tensor:
        return tensors[name].read()

    def part(name: str, cut: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(tensors[name].dtype, size, lambda: cut(whole(name)).reshape(size).contiguous().clone())

    def cropped(name: str) -> LazyTensor:
        return part(name, lambda tensor: tensor[: shape.vocabulary], (shape.vocabulary, shape.hidden))

    def fused(name: str, groups: int, counts: list[int], names: list[str]) -> dict[str, LazyTensor]:
        return {
            hf: part(name, _taker(groups, counts, i), (groups * counts[i], *tensors[name].shape[1:]))
            for i, hf in enumerate(names)
        }

    made = {HF_EMBEDDING: cropped(EMBEDDING)}
    qkv = [shape.heads // shape.groups * shape.head_dim, shape.head_dim, shape.head_dim]
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            names = [f"{theirs}{name}.{kind}" for name in QKV]
            made |= fused(f"{ours}self_attention.linear_qkv.{kind}", shape.groups, qkv, names)
        made |= fused(ours + "mlp.linear_fc1.weight", 1, [shape.ffn] * 2, [theirs + name for name in FC1])
        for name, hf in (SAME | (QK_NORMS if shape.qk_norm else {})).items():
            made[theirs + hf] = tensors[ours + name]
    made[HF_NORM] = tensors[NORM]
    return made | ({} if shape.tied else {HF_HEAD: cropped(HEAD)})


def join(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Rows of several matrices as one: for each group, its rows of the first, of the second, ...  Pure."""
    rest = parts[0].shape[1:]
    return torch.cat([part.view(groups, -1, *rest) for part in parts], 1).view(-1, *rest)


def take(tensor: torch.Tensor, groups: int, counts: list[int], index: int) -> torch.Tensor:
    """The inverse of :func:`join` for one of the matrices, which have ``counts`` rows in each group.  Pure."""
    by_group = tensor.view(groups, sum(counts), *tensor.shape[1:])
    return by_group.narrow(1, sum(counts[:index]), counts[index])


def _taker(groups: int, counts: list[int], index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: take(tensor, groups, counts, index)


def _joined(parts: list[LazyTensor], groups: int) -> LazyTensor:
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(
        parts[0].dtype, (rows, *parts[0].shape[1:]), lambda: join([part.read() for part in parts], groups)
    )


def _padded(tensor: LazyTensor, rows: int) -> LazyTensor:
    def read() -> torch.Tensor:
        values = tensor.read()
        return torch.cat([values, values.new_zeros(rows - values.shape[0], *values.shape[1:])])

    return LazyTensor(tensor.dtype, (rows, *tensor.shape[1:]), read) if tensor.shape[0] < rows else tensor


def _refuse_other_shapes(tensors: Mapping[str, LazyTensor], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    problems = [f"it has no {name}" for name in wanted if name not in tensors]
    problems += [
        f"it has {name}, which config.json does not ask for" for name in sorted(tensors.keys() - wanted.keys())
    ]
    for name, size in wanted.items():
        if name in tensors and tensors[name].shape != size:
            problems.append(f"{name} is {tensors[name].shape}, must be {size}")
    if problems:
        raise ConversionError(
            f"{where}: does not fit its config.json: {listed(problems)}. Give the config of this model."
        )
