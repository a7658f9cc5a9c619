"""PEFT's ``adapter_config.json``: what each setting means for the tensors beside it, and what no reader here takes.

In: the file's content.  Out: which tensor of a base a layer adapts, its r and its scale; what makes no sense; why an
adapter does not hold on the base on disk.  Nothing of PEFT is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_one_dist.config.lora import by_pattern

LIVE = "PeftModel.from_pretrained(base, adapter)"
MERGED_BY_PEFT = f"{LIVE}.merge_and_unload().save_pretrained(out)"
NOT_MERGED = ("alora_invocation_tokens", "arrow_config")  # what depends on the input, and PEFT does not merge either
# Names of input and output embeddings, which PEFT saves when they were resized.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings")
HEADS = ("lm_head", "embed_out", "output_projection")
# By what layers have their own r and scale; by what an adapter is more than a pair A, B for each linear layer, ...
PATTERNS = ("rank_pattern", "alpha_pattern")
BEYOND_PAIRS = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "bias")
# ... what else is honoured here, and what only says how the adapter was made.
HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "exclude_modules"}
HONOURED |= {"layers_to_transform", "ensure_weight_tying", "fan_in_fan_out", *PATTERNS, *BEYOND_PAIRS}
HISTORY = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
HISTORY |= {"lora_dropout", "init_lora_weights", "layers_pattern", "megatron_core", "loftq_config", "eva_config"}
HISTORY |= {"corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "tp_plan", "parent_library"}
LANGUAGE_MODELS = ("language_model", "text_model")  # as transformers names the one beside towers
BIASES = ("none", "all", "lora_only")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that PEFT takes out of the base
REPEATED = ("pissa", "olora")  # of these, what PEFT takes out again when it loads the adapter, to the bit


def refused(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What makes no sense in a configuration, and what PEFT does and this package does not, in words."""
    broken, beyond = [], []
    if config.get("peft_type") != "LORA":
        broken.append(f"peft_type is {config.get('peft_type')}, must be LORA")
    if not _positive(config.get("r")) or not isinstance(config.get("lora_alpha"), int | float):
        broken.append(f"r is {config.get('r')} and lora_alpha {config.get('lora_alpha')}: both must be numbers")
    broken += [f"{key} is {config[key]}, must map patterns to numbers" for key in PATTERNS if not _mapping(config, key)]
    if config.get("bias", "none") not in BIASES:
        broken.append(f"bias is {config['bias']}, must be {' or '.join(BIASES)}")
    for key in sorted(config.keys() - HONOURED - HISTORY):
        if config[key]:
            beyond.append(f"{key} is {config[key]}, which is not supported")
    return broken, beyond


def _mapping(config: Mapping[str, Any], key: str) -> bool:
    """Is it, where it is given, what maps regular expressions to positive numbers?"""
    patterns = config.get(key) or {}
    try:
        return all(re.compile(pattern) and value > 0 for pattern, value in patterns.items())
    except (AttributeError, TypeError, re.error):
        return False


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def pefts_way(config: Mapping[str, Any]) -> str:
    """How PEFT does what this package does not."""
    return f"Leave it to PEFT: {LIVE if any(config.get(key) for key in NOT_MERGED) else MERGED_BY_PEFT}."


def changed_base(config: Mapping[str, Any]) -> str | None:
    """Why an adapter whose start was taken out of the base does not hold on the one on disk, and what to do; or None.

    Where PEFT has converted such an adapter, ``init_lora_weights`` is true: that one holds, at rank 2r.
    """
    start = str(config.get("init_lora_weights")).lower()
    if not start.startswith(CHANGES_BASE):
        return None
    again = f" Or leave it to PEFT, which takes it out again: {MERGED_BY_PEFT}." if start in REPEATED else ""
    return (
        f"init_lora_weights is {start}, which changed the base: the adapter does not hold on the one on disk. Save it "
        f"with path_initial_model_for_weight_conversion, the folder of the adapter before its training.{again}"
    )


def beyond_pairs(config: Mapping[str, Any], known: Collection[str] = ()) -> list[str]:
    """Settings but the ``known`` by which an adapter is more than a pair for each linear layer, in words."""
    named = [k for k in BEYOND_PAIRS if k not in known and config.get(k) not in (None, False, "none", {}, [])]
    return [f"{key} is {config[key]}, which is not supported" for key in named]


def saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """Does ``modules_to_save`` name this module or one around it?  By the end of the name, as PEFT does."""
    ends = tuple(config.get("modules_to_save") or ())
    around = module.split(".")
    return any(".".join(around[:count]).endswith(ends) for count in range(1, len(around) + 1))


def is_embedding(module: str) -> bool:
    """Is it an input or output embedding, by its name?"""
    return module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)


def is_head(module: str) -> bool:
    """Is it an output embedding, by its name?"""
    return module.rpartition(".")[2] in HEADS


def tokens_of(config: Mapping[str, Any], module: str) -> list[int] | None:
    """The tokens of an embedding that were trained, or None if ``trainable_token_indices`` is no list of numbers.

    Where it names each embedding's, an output embedding that it does not name is tied and has the input's.
    """
    told = config.get("trainable_token_indices")
    if isinstance(told, dict):
        named = [tokens for key, tokens in told.items() if module.endswith(key)]
        told = next(iter([*named, *told.values()]), None)
    if not isinstance(told, list) or not all(isinstance(token, int) and token >= 0 for token in told):
        return None
    return told


def target_modules(endings: Collection[str], names: Collection[str]) -> list[str] | str:
    """``endings`` for ``adapter_config.json``; of a language model beside towers as an expression that spares these.

    Args:
        names: of the adapted modules.
    """
    within = {part for name in names for part in name.split(".") if part in LANGUAGE_MODELS}
    if not within:
        return sorted(endings)
    either = "|".join(sorted(within))
    inside = {re.sub(rf"(?:.*\.)?(?:{either})\.", "", ending) for ending in endings}
    ends = "|".join(map(re.escape, sorted(inside)))
    outside = [re.escape(name) for name in names if not within & {*name.split(".")}]  # a head
    return "|".join([rf"(?:.*\.)?(?:{either})\.(?:.*\.)?(?:{ends})", *outside])


def adapted(config: Mapping[str, Any], module: str, parameter: str = "weight") -> str | None:
    """The name that PEFT's patterns must match for a layer: of the module, or of its parameter; None: no target.

    ``target_modules`` that is ``all-linear`` or absent names any weight; ``target_parameters`` names one by its end.
    """
    name = f"{module}.{parameter}"
    if any(name == target or name.endswith(f".{target}") for target in config.get("target_parameters") or ()):
        return name
    return module if parameter == "weight" and _is_target_module(config, module) else None


def _is_target_module(config: Mapping[str, Any], module: str) -> bool:
    targets = config.get("target_modules")
    if targets is None:
        return not config.get("target_parameters")
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def parameters_of(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that are adapted; more than one by ``target_parameters`` alone."""
    ends = (target.rpartition(".")[2] for target in config.get("target_parameters") or ())
    found = {parameter for parameter in ("weight", *ends) if adapted(config, module, parameter)}
    return sorted(found)


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """r of a layer, by the name that :func:`adapted` gives it."""
    return by_pattern((config.get("rank_pattern") or {}).items(), name, config["r"])


def scale_of(config: Mapping[str, Any], name: str) -> float:
    """alpha / r of a layer, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    r = rank_of(config, name)
    alpha = by_pattern((config.get("alpha_pattern") or {}).items(), name, config["lora_alpha"])
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
