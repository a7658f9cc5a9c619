"""Rules over more than one setting, and against the files that a config names.  Reads no weight; not collective."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_one_dist.config.effect import idle, shown, value_of
from lora_one_dist.config.settings import (
    DATA_SUFFIXES,
    DataConfig,
    DeepSpeedConfig,
    InitConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What a ZeRO JSON may hold: memory policy that acts on a frozen base. DeepSpeed ignores unknown keys in silence.
ZERO_KEYS = {
    0: {"stage"},
    3: {
        "stage",
        "offload_param",
        "overlap_comm",
        "log_trace_cache_warnings",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    },
}
ZERO_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    key: (
        ("a whole number, at least 0", lambda value: type(value) in (int, float) and value >= 0 and value % 1 == 0)
        if key.startswith("stage3_")
        else ("true or false", lambda value: type(value) is bool)
    )
    for key in ZERO_KEYS[3] - {"stage", "offload_param"}
}
# What `lora_one_dist` sets itself; a ZeRO JSON that also sets it would be a second source of the same truth.
DEEPSPEED_KEYS_SET_BY_CODE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "bfloat16",
    "fp16",
    "torch_autocast",
    "optimizer",
    "scheduler",
    "zero_allow_untested_optimizer",
)


def cross_checks(groups: Mapping[str, Any]) -> list[str]:
    """Rules over more than one field, and against the files that the config names.

    ``groups``: those of a config that are well-formed, by name.
    """
    checks: dict[str, Callable[[Any], Iterator[str]]] = {
        "model": _check_model,
        "data": _check_data,
        "lora": _check_lora,
        "init": _check_init,
        "train": _check_train,
        "deepspeed": _check_deepspeed,
        "resume": _check_resume,
    }
    problems = [problem for name, check in checks.items() if name in groups for problem in check(groups[name])]
    problems += [f"{key} = {shown(value_of(groups, key))}: {fault}" for key, _, fault in idle(groups)]
    if {"train", "deepspeed"} <= groups.keys() and groups["train"].mode == "full":
        problems += _check_full(groups["train"], groups["deepspeed"])
    if {"train", "optim"} <= groups.keys():
        train, optim = groups["train"], groups["optim"]
        if train.max_steps and optim.warmup_steps >= train.max_steps:
            problems.append(
                f"optim.warmup_steps = {optim.warmup_steps}: must be below train.max_steps = {train.max_steps}. "
                "Lower it, or the learning rate never reaches optim.lr."
            )
    if {"train", "lora"} <= groups.keys() and groups["train"].max_steps and groups["lora"].kind == "adalora":
        lora, steps = groups["lora"], groups["train"].max_steps
        if lora.adalora_warmup_steps + lora.adalora_final_steps >= steps:
            problems.append(lora.no_room_to_prune(f"train.max_steps is {steps}"))
    return problems


def _check_model(model: ModelConfig) -> Iterator[str]:
    if model.dtype == "fp32" and model.attn_implementation.startswith(("flash", "varlen")):
        yield f"model.attn_implementation = {model.attn_implementation}: needs dtype bf16. Use sdpa with fp32."
    path = model.path  # os.path: pathlib raises for names that no file can have
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            yield f"model.path = {model.path}: holds no config.json. Give the folder that save_pretrained wrote."
    elif os.path.exists(path) or not HUB_NAME.fullmatch(path) or "/" not in path:
        yield f"model.path = {model.path}: is neither a folder nor a hub name. Give a folder, or org/model."


def _check_data(data: DataConfig) -> Iterator[str]:
    for key in ("train", "eval"):
        value = getattr(data, key)
        if value is None:
            continue
        sources = [value] if isinstance(value, str) else value
        if not sources:
            yield f"data.{key} = []: must name at least one file. Add a path."
        for source in sources:
            path = Path(source)
            looks_like_file = path.suffix in DATA_SUFFIXES or len(sources) > 1 or os.path.isfile(source)
            if looks_like_file and not os.path.isfile(source):
                yield f"data.{key} = {source}: no such file. Check the path; relative paths start where you launch."
            elif looks_like_file and path.suffix not in DATA_SUFFIXES:
                yield f"data.{key} = {source}: must end in {' or '.join(DATA_SUFFIXES)}. Convert it."
            elif not looks_like_file and not os.path.isdir(source) and not HUB_NAME.fullmatch(source):
                yield f"data.{key} = {source}: is no data set name. Files end in {', '.join(DATA_SUFFIXES)}."
    if data.eval is not None and data.eval_fraction is not None:
        yield (
            f"data.eval = {data.eval}, data.eval_fraction = {data.eval_fraction}: at most one may be given. Leave one "
            "out, or null."
        )
    for key in ("prompt", "completion"):
        yield from _check_template(f"data.{key}", getattr(data, key))


def _check_lora(lora: LoraConfig) -> Iterator[str]:
    if lora.kind == "adalora" and lora.target_r >= lora.r:
        yield f"lora.adalora_target_r = {lora.target_r}: must be below lora.r = {lora.r}. Lower it or raise lora.r."


def _check_template(key: str, template: str) -> Iterator[str]:
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        yield f"{key} = {template!r}: is not a template ({error}). Write columns as {{name}}, braces doubled."
        return
    if not columns or not all(re.fullmatch(r"\w+", name) for name in columns):
        yield f"{key} = {template!r}: must name columns as {{name}}, letters and digits only. E.g. 'Q: {{query}} A: '."


def _check_init(init: InitConfig) -> Iterator[str]:
    if init.adapter is not None and not os.path.isfile(os.path.join(init.adapter, "adapter_config.json")):
        yield f"init.adapter = {init.adapter}: holds no adapter_config.json. Give a PEFT folder."


def _check_train(train: TrainConfig) -> Iterator[str]:
    if train.max_steps != 0 and (train.epochs is None) == (train.max_steps is None):
        yield (
            f"train.epochs = {train.epochs}, train.max_steps = {train.max_steps}: exactly one must be given. "
            "Give one and leave the other out, or null."
        )
    if train.global_batch_size < train.micro_batch_size:
        yield (
            f"train.global_batch_size = {train.global_batch_size}: must be at least train.micro_batch_size = "
            f"{train.micro_batch_size}. Raise it or lower micro_batch_size."
        )
    if train.exact_match_pattern is not None:
        pattern = train.exact_match_pattern
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"train.exact_match_pattern = {pattern!r}: is no regular expression ({error}). Correct it."


def _check_full(train: TrainConfig, deepspeed: DeepSpeedConfig) -> Iterator[str]:
    """Of ``train.mode`` full."""
    if train.max_steps == 0:
        yield "train.max_steps = 0: initialises adapters, of which train.mode full has none. Give at least 1."
    try:
        offloads = deepspeed.offloads
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # said of the JSON itself
    if offloads:
        yield (
            f"deepspeed.config = {deepspeed.config}: offload_param keeps a frozen base in host memory; train.mode full "
            "changes the weights where they are, and does not support it. Take ds_configs/zero3.json and more ranks."
        )


def _check_resume(resume: str) -> Iterator[str]:
    if resume not in ("auto", "never") and not os.path.isfile(os.path.join(resume, "manifest.json")):
        yield (
            f"resume = {resume}: is neither auto nor never nor a checkpoint's folder, which holds a manifest.json. "
            "Give one of them, e.g. runs/mine/checkpoints/step-100."
        )


def _check_deepspeed(deepspeed: DeepSpeedConfig) -> Iterator[str]:
    path = deepspeed.config
    try:
        policy = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"deepspeed.config = {path}: cannot be read as JSON: {error}. ds_configs/ holds working ones."
        return
    zero = policy.get("zero_optimization", {}) if isinstance(policy, dict) else None
    if not isinstance(zero, dict) or not isinstance(zero.get("offload_param") or {}, dict):
        yield (
            f"deepspeed.config = {path}: the file, its zero_optimization and that one's offload_param must be objects "
            "{...}. ds_configs/ holds working ones."
        )
        return
    for key in DEEPSPEED_KEYS_SET_BY_CODE:
        if key in policy:
            yield f"deepspeed.config = {path}: sets {key!r}, which the run's YAML sets. Take it out of the JSON."
    stage = zero.get("stage", 0)
    known = ZERO_KEYS.get(stage) if type(stage) is int else None
    if known is None:
        yield (
            f"deepspeed.config = {path}: zero_optimization.stage = {stage!r}, must be 0 or 3. A frozen base has no "
            "gradients or moments for stages 1 and 2 to partition: 0 takes the same memory, 3 less."
        )
    for key in sorted(set(policy) - {"zero_optimization", *DEEPSPEED_KEYS_SET_BY_CODE}):
        yield f"deepspeed.config = {path}: {key!r} has no effect here or is not supported. Take it out."
    for key in sorted(set(zero) - (known or set(zero))):
        yield (
            f"deepspeed.config = {path}: zero_optimization.{key} has no effect on a frozen base at stage {stage}, or "
            "is not supported. Take it out."
        )
    for key in sorted(set(zero) & ZERO_VALUES.keys()):
        rule, accepts = ZERO_VALUES[key]
        if not accepts(zero[key]):
            yield f"deepspeed.config = {path}: zero_optimization.{key} = {zero[key]!r}, must be {rule}. Correct it."
    device = (zero.get("offload_param") or {}).get("device", "none")
    if device not in ("none", "cpu"):
        yield f"deepspeed.config = {path}: offload_param.device = {device}, must be none or cpu. NVMe is not supported."
