"""Typed configuration of one run.

In: one YAML file and dotted overrides (``lora.r=16``).  Out: a frozen :class:`Config`.
Runs on every rank before a model is touched; reads no weights.  Every problem of a config is found before any is
reported, in one :class:`ConfigError`, each as value, rule and remedy.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
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

DEFAULT_GAMMA = {"lora_one": 128.0, "lora_one_v1": 64.0, "lora_ga": 16.0}
GRADIENT_METHODS = tuple(DEFAULT_GAMMA)
COMPENSATED_METHODS = ("lora_one_v1", "lora_ga", "pissa")


class ConfigError(ValueError):
    """Every problem of a config: ``problems`` is a list of 'key = value: rule. remedy.' strings."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        plural = "problem" if len(self.problems) == 1 else "problems"
        super().__init__(f"{len(self.problems)} {plural} in the config:\n" + "\n".join(f"  - {p}" for p in problems))


class _Group(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(_Group):
    """The pre-trained causal language model; its weights stay frozen."""

    path: str
    """Folder of an `AutoModelForCausalLM` (config.json, *.safetensors, tokenizer), or a hub name such as org/model."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the base weights and of the adapters' working copies; masters and moments are always fp32."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention kernel, as transformers names it."""
    gradient_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "non_reentrant"
    """Recompute each block but the last in backward: activation memory of one block instead of all. non_reentrant stops
    before a block's last linear layer, whose product nothing needs: the faster of the two."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin where there are no safetensors; tensors only, torch refuses what else a pickle holds."""


class DataConfig(_Group):
    """What the model sees. Files (JSONL, Parquet, CSV) or the name of a `datasets` data set."""

    train: str | list[str]
    """File, list of files, or data set name for training."""
    eval: str | list[str] | None = None
    """File, list of files, or data set name for evaluation; none: no evaluation, or eval_fraction."""
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    """Hold out this share of the training rows for evaluation instead, in (0, 1); at least one row on each side. The
    same rows at any train.seed and number of ranks, so that runs compare."""
    train_split: str = "train"
    """Split of a named data set to train on; slices such as train[:100000] work. Files have none."""
    eval_split: str = "test"
    """Split of a named data set to evaluate on. Files have none."""
    format: Literal["completion", "chat", "text"] = "completion"
    """completion: prompt and completion columns; chat: a list of {role, content} messages; text: one plain column."""
    prompt: str = "{prompt}"
    """Template of the prompt over the row's columns (format completion), e.g. 'Q: {query}\\nA: '."""
    completion: str = "{completion}"
    """Template of the completion over the row's columns (format completion)."""
    messages: str = "messages"
    """Column with the messages (format chat)."""
    text: str = "text"
    """Column with the text (format text)."""
    loss_on: Literal["completion", "all"] = "completion"
    """completion: loss on completions and assistant turns only; all: on every token. Format text is always all."""
    max_length: int = Field(1024, ge=2)
    """Tokens per sample, at least 2; longer samples are cut at the end, counted and reported."""
    packing: bool = False
    """Put several samples into one row of at most max_length tokens: attention and positions start anew in each. A
    sample of the other settings is then such a row: train.global_batch_size, train.micro_batch_size, init.num_samples.
    Evaluation data stay as they are. For models whose attention masks follow position_ids, which is checked."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use only the first rows of the training data."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Use only the first rows of the evaluation data."""


class LoraConfig(_Group):
    """Shape of the adapters, in PEFT's terms."""

    r: int = Field(8, ge=1)
    """The LoRA rank, at least 1 and at most min(out_features, in_features) of every target; typical 8 to 64."""
    alpha: float = Field(16.0, gt=0)
    """Scale: s = alpha / r, or alpha / sqrt(r) with use_rslora. Above 0."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training, in [0, 1); always off in the gradient phase."""
    use_rslora: bool = True
    """s = alpha / sqrt(r) (arXiv 2312.03732), as in the LoRA-One recipes."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """all-linear (every linear layer but the output head), or a list of module name endings, e.g. [q_proj, v_proj]."""


class InitConfig(_Group):
    """How the adapters start."""

    method: Literal["lora_one", "lora_one_v1", "lora_ga", "pissa", "lora"] = "lora_one"
    """lora_one: arXiv 2502.01235v3; lora_one_v1: its first form; lora_ga: arXiv 2407.05000; pissa: arXiv 2404.02948;
    lora: Kaiming A, zero B."""
    adapter: str | None = None
    """PEFT folder to start from instead of a method."""
    num_samples: int = Field(8, ge=1)
    """Training samples in the one-step gradient, at least 1; the authors take 8."""
    average: Literal["token", "micro_batch"] = "token"
    """token: mean over all target tokens; micro_batch: mean of the micro-batches' means, as the authors do."""
    gamma: float | None = Field(None, gt=0)
    """Scale of the initial adapters (larger is smaller), above 0; default 128 lora_one, 64 lora_one_v1, 16 lora_ga."""
    buffer: Literal["device", "host"] = "device"
    """Where an owner keeps the fp32 gradients of its layers between the backward passes and the SVDs."""
    layer_groups: int = Field(1, ge=1)
    """Passes over the same batch, each for 1/K of the layers: owner memory divided by K, for K forward passes and
    (K + 1) / 2 backward."""
    halves: bool = False
    """Report the overlap of the top-r spaces of the batch's two halves: do the samples suffice? Costs twice the owner's
    gradient memory, three SVDs a layer instead of one, and a second pass where one micro-batch a rank would do."""
    svd_tolerance: float = Field(1e-3, gt=0, le=0.1)
    """Certified error of a top space above which its SVD iterates further, in (0, 0.1]; a wide bound on the angle."""


class OptimConfig(_Group):
    """The update of the adapters."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay and bias correction; sgd: plain, decoupled weight decay."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate, above 0."""
    lr_ratio_b: float = Field(1.0, gt=0)
    """LoRA+ (arXiv 2402.12354): learning rate of lora_B over that of lora_A; 1 is plain LoRA."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays, each in [0, 1)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon, above 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, at least 0."""
    preconditioner: Literal["riemannian", "none"] = "riemannian"
    """riemannian: gA <- (B'B + damping I)^-1 gA, gB <- gB (AA' + damping I)^-1 (arXiv 2402.02347)."""
    damping: float = Field(1e-6, gt=0)
    """The preconditioner's damping, above 0. Sweep it with the rate: tuned values in papers span 1e-6 to 100."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the raw gradient's global norm, before the preconditioner; 0: do not clip."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up: linear or cosine to 0 at the last step, or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0, at least 0."""


class TrainConfig(_Group):
    """The loop."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training data, above 0; give this or max_steps."""
    max_steps: int | None = Field(None, ge=0)
    """Optimizer steps; 0: initialise the adapters, write them and stop, whatever epochs says. Give this or epochs."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass and rank, at least 1."""
    global_batch_size: int = Field(32, ge=1)
    """Samples per optimizer step over all ranks, at least micro_batch_size; the accumulation steps follow."""
    log_steps: int = Field(1, ge=1)
    """Optimizer steps between two lines of metrics.jsonl and of progress."""
    eval_steps: int = Field(0, ge=0)
    """Optimizer steps between evaluations; 0: only before the first and after the last step."""
    exact_match_samples: int = Field(0, ge=0)
    """Evaluation samples to answer by greedy generation before and after training; 0: none. Under ZeRO-3 each
    generated token gathers the whole base: keep it small."""
    exact_match_pattern: str | None = None
    """Regular expression whose last match (first group, if any) is the answer; none: the whole completion."""
    exact_match_max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate for an exact match, at least 1."""
    seed: int = Field(0, ge=0)
    """Seed of the data order, the SVDs, the Kaiming initialisation and dropout."""


class DeepSpeedConfig(_Group):
    """Where the base weights live."""

    config: str = "ds_configs/zero3.json"
    """DeepSpeed JSON with the memory policy only: ZeRO stage 0 (replicated) or 3 (partitioned), offload, buckets."""
    shard_group: Literal["world", "node"] = "world"
    """Ranks that share one copy of the base (stage 3). world: all, least memory. node: those of a host, so that only
    adapters cross the network in training; take it wherever one node can hold the base."""

    def policy(self) -> dict[str, Any]:
        """The content of the JSON (memory policy only)."""
        return json.loads(Path(self.config).read_text(encoding="utf-8"))

    @property
    def stage(self) -> int:
        """0: every rank holds the base; 3: the base is partitioned."""
        return int(self.zero.get("stage", 0))

    @property
    def zero(self) -> dict[str, Any]:
        """The JSON's ``zero_optimization``."""
        return self.policy().get("zero_optimization", {})

    @property
    def offloads(self) -> bool:
        """Is the base kept in host memory?"""
        return (self.zero.get("offload_param") or {}).get("device", "none") != "none"


class CheckpointConfig(_Group):
    """What a run keeps of itself, to go on after a failure."""

    steps: int = Field(100, ge=0)
    """Optimizer steps between two checkpoints; 0: only the initialisation, the best, when asked to stop, the end."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep, at least 1; the best one is kept besides."""
    keep_best: bool = True
    """Save and keep the checkpoint with the lowest evaluation loss (needs train.eval_steps)."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When the disk is full, read-only or gone: continue warns and tries again at the next checkpoint; stop ends the
    run. The checkpoints before are whole either way."""
    timeout_seconds: float = Field(600.0, ge=1)
    """Seconds after which a disk that has not taken a rank's files counts as failed, at least 1; at the end of the run
    also how long the adapter is tried to be written."""


class CommConfig(_Group):
    """How long ranks wait for each other."""

    rendezvous_seconds: float = Field(300.0, ge=5)
    """Seconds for all ranks to arrive at the start, at least 5; slow file systems make late ranks."""
    init_timeout_seconds: float = Field(7200.0, ge=30)
    """Time-out of a collective while loading and initialising, at least 30."""
    timeout_seconds: float = Field(1800.0, ge=30)
    """Time-out of a collective while training, at least 30."""
    lost_after_seconds: float = Field(20.0, ge=4, le=50)
    """Seconds without an answer of a host's network after which it counts as lost and the job ends, 4 to 50."""


class Config(_Group):
    """One run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    comm: CommConfig = CommConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint of output_dir, if there is one; never: refuse a folder that holds a
    run; or a checkpoint's folder (.../checkpoints/step-N) to start from while output_dir has none of its own."""
    output_dir: str
    """Folder of the run, on a file system that all hosts share: created, gone on with, or refused if it holds anything
    else."""

    @property
    def gamma(self) -> float:
        """The scale in force: ``init.gamma``, or the method's own default."""
        return self.init.gamma if self.init.gamma is not None else DEFAULT_GAMMA.get(self.init.method, 1.0)

    @property
    def scaling(self) -> float:
        """s in W + s B A: alpha / r, or alpha / sqrt(r) under rsLoRA."""
        return self.lora.alpha / (self.lora.r**0.5 if self.lora.use_rslora else self.lora.r)

    def to_yaml(self) -> str:
        """The resolved config, defaults included, as YAML that :func:`load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings give each key once: plain YAML keeps the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides (values are YAML), check everything.  Not collective.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"--config {path}: cannot be read as YAML: {error}. Give a YAML file."]) from error
    if not isinstance(raw, dict):
        value = f"--config {path}: holds {type(raw).__name__}"
        raise ConfigError([f"{value}, must hold groups such as 'model:'. Give the YAML of a run."])
    return parse_config(raw, overrides)


def parse_config(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check a mapping of groups, after ``key.sub=value`` overrides.

    Groups that are well-formed are checked against each other even if others are not.

    Raises:
        ConfigError: with every problem found.
    """
    settings, found = copy.deepcopy(dict(raw)), []
    for override in overrides:
        try:
            _apply_override(settings, override)
        except ValueError as error:
            found.append(str(error))
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        found += list(dict.fromkeys(_describe(e) for e in error.errors()))
        groups = _valid_groups(settings)
    else:
        groups = {name: getattr(config, name) for name in Config.model_fields}
    found += _cross_checks(groups)
    if found:
        raise ConfigError(found)
    return config


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    parts = key.lstrip("-").split(".")
    if not separator or not all(parts):
        raise ValueError(f"override {override!r}: must be key=value with a dotted key, e.g. lora.r=16.")
    node = raw
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {part} holds {child!r}, not a group. Check the key.")
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"override {override!r}: its value is no YAML: {what}. Quote it: {parts[-1]}='...'."
        ) from error


def _describe(error: Any) -> str:
    """One pydantic error as 'key = value: rule. remedy.'"""
    path: list[str] = []
    fields: Mapping[str, Any] = Config.model_fields
    field = None
    for part in map(str, error["loc"]):
        if field is not None and not fields:
            break  # below a setting: an item of a list, or what pydantic calls a member of a union
        path.append(part)
        if part not in fields:
            break
        field = fields[part]
        fields = getattr(field.annotation, "model_fields", {})
    key = ".".join(path)
    help_text = " ".join((field.description or "").split()) if field is not None else ""
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
        return f"{key} = {error['input']!r}: no such setting. {remedy}"
    if error["type"] == "missing" and len(error["loc"]) == len(path):  # else an item of a pair
        return f"{key}: is required. {help_text or _give(path)}"
    return f"{key} = {error['input']!r}: {error['msg'].replace('Input should', 'should')}. {help_text or _give(path)}"


def _give(path: Sequence[str]) -> str:
    return f"Give a group of settings: {', '.join(_known_keys(path[:1]))}." if len(path) == 1 else "Check the key."


def _known_keys(path: Sequence[str]) -> list[str]:
    fields: Mapping[str, Any] = Config.model_fields
    for part in path:
        fields = getattr(fields[part].annotation, "model_fields", {}) if part in fields else {}
    return list(fields)


def _valid_groups(raw: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        group = field.annotation
        if not (isinstance(group, type) and issubclass(group, BaseModel)):
            continue
        try:
            groups[name] = group.model_validate(raw.get(name, {}))
        except ValidationError:
            continue  # already in the list that the whole config gave
    return groups


def _cross_checks(groups: Mapping[str, Any]) -> list[str]:
    """Rules over more than one field, and against the files that the config names."""
    checks: dict[str, Callable[[Any], Iterator[str]]] = {
        "model": _check_model,
        "data": _check_data,
        "init": _check_init,
        "optim": _check_optim,
        "train": _check_train,
        "deepspeed": _check_deepspeed,
    }
    problems = [problem for name, check in checks.items() if name in groups for problem in check(groups[name])]
    if "resume" in groups:
        problems += _check_resume(groups["resume"])
    if {"train", "optim"} <= groups.keys():
        train, optim = groups["train"], groups["optim"]
        if train.max_steps and optim.warmup_steps >= train.max_steps:
            problems.append(
                f"optim.warmup_steps = {optim.warmup_steps}: must be below train.max_steps = {train.max_steps}. "
                "Lower it, or the learning rate never reaches optim.lr."
            )
    if {"train", "data"} <= groups.keys():
        train, data = groups["train"], groups["data"]
        evaluates = data.eval is not None or data.eval_fraction is not None
        if train.exact_match_samples and not (evaluates and data.format == "completion"):
            problems.append(
                f"train.exact_match_samples = {train.exact_match_samples}: needs data.eval or data.eval_fraction, and "
                "data.format completion. Give both, or set it to 0."
            )
        if train.eval_steps and not evaluates:
            problems.append(
                f"train.eval_steps = {train.eval_steps}: needs data.eval or data.eval_fraction. Give one, or set "
                "eval_steps to 0."
            )
    return problems


def _changed(group: BaseModel) -> set[str]:
    """Fields set to something else than their default: what would silently have no effect."""
    return {name for name, field in type(group).model_fields.items() if getattr(group, name) != field.default}


def _check_model(model: ModelConfig) -> Iterator[str]:
    if model.dtype == "fp32" and model.attn_implementation.startswith("flash"):
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
    used_by_format = {"prompt": "completion", "completion": "completion", "messages": "chat", "text": "text"}
    for key, used_by in used_by_format.items():
        if key in _changed(data) and data.format != used_by:
            yield f"data.{key} = {getattr(data, key)!r}: has no effect with data.format {data.format}. Leave it out."
    unused = [f"{key}_split" for key in ("train", "eval") if _names_files(getattr(data, key))]
    unused += ["eval_split", "max_eval_samples"] if data.eval is None else []
    for key in unused:
        if key in _changed(data):
            yield f"data.{key} = {getattr(data, key)}: has no data set to apply to. Leave it out."
    for key in ("prompt", "completion"):
        yield from _check_template(f"data.{key}", getattr(data, key))
    if data.format == "text" and data.loss_on != "completion":
        yield f"data.loss_on = {data.loss_on}: has no effect with data.format text, always all. Leave it out."


def _names_files(source: str | list[str] | None) -> bool:
    return isinstance(source, list) or (source is not None and Path(source).suffix in DATA_SUFFIXES)


def _check_template(key: str, template: str) -> Iterator[str]:
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        yield f"{key} = {template!r}: is not a template ({error}). Write columns as {{name}}, braces doubled."
        return
    if not columns or not all(re.fullmatch(r"\w+", name) for name in columns):
        yield f"{key} = {template!r}: must name columns as {{name}}, letters and digits only. E.g. 'Q: {{query}} A: '."


def _check_init(init: InitConfig) -> Iterator[str]:
    given = _changed(init)
    gradient_only = ("num_samples", "average", "gamma", "halves")
    if init.adapter is not None:
        for key in sorted(given - {"adapter"}):
            yield f"init.{key} = {getattr(init, key)}: has no effect with init.adapter. Leave one of them out."
        if not os.path.isfile(os.path.join(init.adapter, "adapter_config.json")):
            yield f"init.adapter = {init.adapter}: holds no adapter_config.json. Give a PEFT folder."
    elif init.method not in GRADIENT_METHODS:
        without_svd = ("buffer", "layer_groups", "svd_tolerance") if init.method == "lora" else ()
        for key in (*gradient_only, *without_svd):
            if key in given:
                yield f"init.{key} = {getattr(init, key)}: has no effect with init.method {init.method}. Leave it out."


def _check_optim(optim: OptimConfig) -> Iterator[str]:
    given = _changed(optim)
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas = {list(optim.betas)}: each must be in [0, 1). The usual ones are [0.9, 0.999]."
    if optim.preconditioner == "none" and "damping" in given:
        yield f"optim.damping = {optim.damping}: has no effect with optim.preconditioner none. Leave it out."
    if optim.name == "sgd":
        for key in ("betas", "eps"):
            if key in given:
                yield f"optim.{key} = {getattr(optim, key)}: has no effect with optim.name sgd. Leave it out."


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
    if train.exact_match_samples == 0:
        for key in ("exact_match_pattern", "exact_match_max_new_tokens"):
            if key in _changed(train):
                value = getattr(train, key)
                yield f"train.{key} = {value!r}: has no effect with train.exact_match_samples 0. Leave it out."
    if train.exact_match_pattern is not None:
        pattern = train.exact_match_pattern
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"train.exact_match_pattern = {pattern!r}: is no regular expression ({error}). Correct it."


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
    if stage == 0 and deepspeed.shard_group != "world":
        yield (
            f"deepspeed.shard_group = {deepspeed.shard_group}: has no effect at stage 0, where every rank holds the "
            "base. Leave it out, or give a stage 3 JSON."
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
