"""A model's folder from Hugging Face's format to Megatron-core's and back.

In and out: a folder with ``config.json`` and safetensors, and a folder as Megatron's ``--load`` takes it::

    latest_checkpointed_iteration.txt     "release": weights without a training
    release/                              the distributed checkpoint
    hf/                                   config.json and tokenizer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one_dist.convert import files, megatron, megatron_files
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, read_json

RELEASE, HF = "release", "hf"
EXTRA_STATES = [
    f"decoder.layers.{name}"
    for name in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attention.core_attention",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
]


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, and what its user should know."""

    hf: Path
    """Folder with config.json and tokenizer."""
    tensors: dict[str, LazyTensor]
    arguments: dict[str, Any]
    """Of Megatron."""
    notes: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def plan_to_megatron(model: Path, tp: int, pp: int, divisible_by: int = 128) -> Plan:
    """Check a Hugging Face model and name its tensors as Megatron does.  Reads no values.

    Raises:
        ConversionError: for a family, size or tensor that does not fit.
    """
    config = read_json(model / "config.json")
    shape = megatron.geometry(config, str(model))
    megatron.check_parallel(shape, tp, pp)
    shards = files.model_shards(model)
    held = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    rows = megatron.padded_vocabulary(shape.vocabulary, divisible_by * tp)
    tensors, notes = megatron.to_megatron(held, shape, rows, str(model))
    notes.insert(0, f"{config['model_type']}, {shape.layers} layers; vocabulary {shape.vocabulary} padded to {rows}")
    arguments = megatron_arguments(config, shape) | {
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": divisible_by,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
    }
    return Plan(model, tensors, arguments, notes)


def run_to_megatron(planned: Plan, out: Path) -> None:
    """Write Megatron's folder: new, whole or not there."""
    tp = planned.arguments["tensor_model_parallel_size"]
    with files.new_folder(out, planned.num_bytes) as partial:
        for name in (RELEASE, HF):
            (partial / name).mkdir()
        files.copy_rest(planned.hf, partial / HF)
        megatron_files.write(
            partial / RELEASE,
            planned.tensors,
            lambda name: megatron.pieces(name, tp),
            planned.arguments,
            EXTRA_STATES,
        )
        (partial / megatron_files.TRACKER).write_text(RELEASE, encoding="utf-8")


def is_checkpoint(folder: Path) -> bool:
    """Does a folder look like a checkpoint of Megatron's?"""
    return (folder / megatron_files.TRACKER).is_file() or (folder / megatron_files.METADATA).is_file()


def plan_to_hf(checkpoint: Path, hf: Path | None = None) -> Plan:
    """Check a Megatron checkpoint against a config.json and name its tensors as Hugging Face does.  Reads no values.

    Raises:
        ConversionError: if files are missing, or the two do not belong together.
    """
    opened = megatron_files.open_checkpoint(checkpoint)
    found = hf_folder(checkpoint, opened, hf)
    config = read_json(found / "config.json")
    shape = megatron.geometry(config, str(found))
    tensors = megatron.to_hf(opened.tensors, shape, str(opened.folder))
    _refuse_other_padding(opened, shape.vocabulary)
    rows = opened.tensors[megatron.EMBEDDING].shape[0]
    notes = [f"{config['model_type']}, {shape.layers} layers; {rows - shape.vocabulary} padding rows are cut off"]
    return Plan(found, tensors, opened.arguments, notes)


def hf_folder(checkpoint: Path, opened: megatron_files.Checkpoint, given: Path | None) -> Path:
    """The folder with config.json that was given, or the one in the checkpoint."""
    beside = [checkpoint / HF, opened.folder.parent / HF]
    found = given or next((folder for folder in beside if folder.is_dir()), None)
    if found is None:
        raise ConversionError(f"{checkpoint}: has no folder {HF} with a config.json. Give --hf, the original model's.")
    return found


def run_to_hf(planned: Plan, out: Path) -> None:
    """Write a Hugging Face model: a new folder, whole or not there."""
    with files.new_folder(out, planned.num_bytes) as partial:
        files.copy_rest(planned.hf, partial)
        files.write_model(partial, files.shard(planned.tensors))


def _refuse_other_padding(opened: megatron_files.Checkpoint, vocabulary: int) -> None:
    """Does the padding follow from the vocabulary, where the checkpoint says how it was padded?"""
    divisor, tp = (opened.arguments.get(k) for k in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    if not isinstance(divisor, int) or not isinstance(tp, int):
        return
    rows = opened.tensors[megatron.EMBEDDING].shape[0]
    wanted = megatron.padded_vocabulary(vocabulary, divisor * tp)
    if rows != wanted:
        raise ConversionError(
            f"{opened.folder}: its vocabulary has {rows} rows; {vocabulary}, as config.json says, would be padded to "
            f"{wanted}. Give the config of this model."
        )


def megatron_arguments(config: dict[str, Any], shape: megatron.Geometry) -> dict[str, Any]:
    """What Megatron-LM's --use-checkpoint-args takes from a checkpoint: the model, under the names of its options."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = megatron.rope_type(config) == "llama3"
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "group_query_attention": shape.groups != shape.heads,
        "kv_channels": shape.head_dim,
        "seq_length": config["max_position_embeddings"],
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(rope.get("rope_theta") or config.get("rope_theta") or 10000),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": scaled,
        "rope_scaling_factor": rope.get("factor", 8.0) if scaled else 1.0,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "swiglu": True,
        "squared_relu": False,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not shape.tied,
        "num_experts": None,
        "window_size": _window(config),
        "ckpt_format": "torch_dist",
    }


def _window(config: dict[str, Any]) -> tuple[int, int] | None:
    """Megatron's (left, right) of a sliding window of w tokens, which counts the token itself: (w - 1, 0)."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return None if window is None else (window - 1, 0)
