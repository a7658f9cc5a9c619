"""Every setting of a run: what it means, what it may be, and where it has an effect.

A :class:`Config` is frozen: what is checked once (:mod:`reading`, :mod:`checks`) stays as it is.
"""

from __future__ import annotations

import datetime
import json
import string
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from lora_one_dist.config.effect import Effect, InsteadOf, not_with, only_with
from lora_one_dist.config.group import AsPath, Group
from lora_one_dist.config.initialise import COMPENSATED_METHODS, DEFAULT_GAMMA, InitConfig
from lora_one_dist.config.lora import LoraConfig
from lora_one_dist.config.optim import PAIR_KINDS, OptimConfig

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def names_files(source: str | list[str] | None) -> bool:
    """Does ``data.train`` or ``data.eval`` name files?  The other names are those of data sets."""
    return isinstance(source, list) or (source is not None and Path(source).suffix in DATA_SUFFIXES)


def _stage_of(path: str) -> int | None:
    """Of the ZeRO JSON; None where it cannot be read, which is another problem."""
    try:
        return DeepSpeedConfig(config=path).stage
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


_NO_DATA_SET = "has no data set to apply to. Leave it out."
_EVALUATES = ("data.eval", "data.eval_fraction")
_GENERATES = not_with("train.exact_match_samples", 0)


class ModelConfig(Group):
    """The pre-trained language model, causal or of an encoder and a decoder (T5), frozen but for train.mode full."""

    path: Annotated[str, AsPath]
    """Folder of an `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` (config.json, *.safetensors, tokenizer), or a hub
    name such as org/model."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the base weights and of the adapters' working copies; masters and moments are always fp32."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "varlen"] = "auto"
    """Attention kernel, as transformers names it (auto: sdpa, or eager where a model has none), or varlen, torch's
    flash kernel over documents end to end: no padding or mask, for packed rows and uneven samples on GPUs, in bf16."""
    recompute: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0, strict=True)] = "auto"
    """Blocks whose inside backward computes again instead of keeping it: as few as memory_gb asks for (auto), all (but
    the last, with which backward begins), none, or the first so many. Each costs a third of its work once more."""
    checkpointing: Annotated[Literal["reentrant", "non_reentrant"], not_with("model.recompute", "none", 0)] = (
        "non_reentrant"
    )
    """How they are recomputed. non_reentrant stops before a block's last linear layer, whose product nothing needs: the
    faster of the two."""
    memory_gb: Literal["auto"] | Annotated[float, Field(gt=0, strict=True)] = "auto"
    """Memory that a rank may fill, 10^9 bytes; a run that needs more is refused before it loads. auto: 92 % of the GPU
    (the rest is for CUDA, NCCL and fragments), or a rank's share of what is free on the host of CPU ranks."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin where there are no safetensors; tensors only, torch refuses what else a pickle holds."""


class DataConfig(Group):
    """What the model sees. Files (JSONL, Parquet, CSV) or the name of a `datasets` data set."""

    train: Annotated[str | list[str], AsPath]
    """File, list of files, or data set name for training."""
    eval: Annotated[str | list[str] | None, AsPath] = None
    """File, list of files, or data set name for evaluation; none: no evaluation, or eval_fraction."""
    eval_fraction: Annotated[float | None, InsteadOf("data.eval")] = Field(None, gt=0, lt=1)
    """Hold out this share of the training rows for evaluation instead, in (0, 1); at least one row on each side. The
    same rows at any train.seed and number of ranks, so that runs compare."""
    train_split: Annotated[str, Effect(("data.train",), lambda train: not names_files(train), _NO_DATA_SET)] = "train"
    """Split of a named data set to train on; slices such as train[:100000] work. Files have none."""
    eval_split: Annotated[
        str, Effect(("data.eval",), lambda eval: eval is not None and not names_files(eval), _NO_DATA_SET)
    ] = "test"
    """Split of a named data set to evaluate on. Files have none."""
    format: Literal["completion", "chat", "text"] = "completion"
    """completion: prompt and completion columns; chat: a list of {role, content} messages; text: one plain column.
    Of an encoder and a decoder (T5) the one reads the prompt, the other writes the completion: completion alone."""
    prompt: Annotated[str, only_with("data.format", "completion")] = "{prompt}"
    """Template of the prompt over the row's columns (format completion), e.g. 'Q: {query}\\nA: '."""
    completion: Annotated[str, only_with("data.format", "completion")] = "{completion}"
    """Template of the completion over the row's columns (format completion)."""
    messages: Annotated[str, only_with("data.format", "chat")] = "messages"
    """Column with the messages (format chat): a list of {role, content}. ShareGPT's `conversations` of {from, value}
    are found where there are no `messages`. A message's weight, 0 or 1, says whether an assistant's turn is learned."""
    tools: Annotated[str, only_with("data.format", "chat")] = "auto"
    """Column with a chat's tools, a list or its JSON text; auto: `tools`, where a row has it; none: leave tools out."""
    text: Annotated[str, only_with("data.format", "text")] = "text"
    """Column with the text (format text)."""
    loss_on: Annotated[
        Literal["completion", "all", "last"],
        not_with("data.format", "text", otherwise="has no effect with data.format text, always all. Leave it out."),
        Effect(
            ("data.loss_on", "data.format"),
            lambda value, form: value != "last" or form == "chat",
            "= last is for data.format chat. Set it to completion.",
        ),
    ] = "completion"
    """completion: loss on completions and assistant turns only; last (format chat): on the turns after the last user
    turn, for templates that leave out earlier thoughts; all: on every token. Format text is always all."""
    max_length: int = Field(1024, ge=2)
    """Tokens per sample, at least 2, a prompt and its completion together; longer samples are cut at the end, counted
    and reported. For a model whose rotary positions follow a batch's longest sample (LongRoPE, dynamic) no sample may
    be longer than its original length."""
    packing: bool = False
    """Put several samples into one row of at most max_length tokens: attention and positions start anew in each. A
    sample of the other settings is then such a row: train.global_batch_size, train.micro_batch_size, init.num_samples.
    Evaluation data stay as they are. For models whose attention masks follow position_ids, which is checked."""
    workers: int | None = Field(None, ge=1)
    """Processes of a host that tokenise, at least 1; none: one for each core that the ranks leave."""
    date: Annotated[datetime.date | None, only_with("data.format", "chat")] = None
    """The day, e.g. 2026-11-29, that chat templates which ask are told; none: that on which the run began."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use only the first rows of the training data."""
    max_eval_samples: Annotated[int | None, not_with("data.eval", None, otherwise=_NO_DATA_SET)] = Field(None, ge=1)
    """Use only the first rows of the evaluation data."""

    @property
    def template_columns(self) -> list[str]:
        """Those that ``prompt`` and ``completion`` name."""
        fields = string.Formatter().parse(self.prompt + self.completion)
        return list(dict.fromkeys(field[1] for field in fields if field[1]))


class TrainConfig(Group):
    """The loop."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training data, above 0; give this or max_steps."""
    max_steps: Annotated[int | None, InsteadOf("train.epochs")] = Field(None, ge=0)
    """Optimizer steps; 0: initialise the adapters, write them and stop, whatever epochs says. Give this or epochs."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass and rank, at least 1."""
    global_batch_size: int = Field(32, ge=1)
    """Samples per optimizer step over all ranks, at least micro_batch_size; the accumulation steps follow."""
    log_steps: int = Field(1, ge=1)
    """Optimizer steps between two lines of metrics.jsonl and of progress."""
    eval_steps: Annotated[
        int,
        Effect(
            _EVALUATES,
            lambda *held: any(source is not None for source in held),
            "needs data.eval or data.eval_fraction. Give one, or set eval_steps to 0.",
        ),
    ] = Field(0, ge=0)
    """Optimizer steps between evaluations; 0: only before the first and after the last step."""
    exact_match_samples: Annotated[
        int,
        Effect(
            (*_EVALUATES, "data.format"),
            lambda eval, fraction, form: (eval, fraction) != (None, None) and form == "completion",
            "needs data.eval or data.eval_fraction, and data.format completion. Give both, or set it to 0.",
        ),
    ] = Field(0, ge=0)
    """Evaluation samples to answer by greedy generation before and after training; 0: none. Under ZeRO-3 each
    generated token gathers the whole base: keep it small."""
    exact_match_pattern: Annotated[str | None, _GENERATES] = None
    """Regular expression whose last match (first group, if any) is the answer; none: the whole completion."""
    exact_match_max_new_tokens: Annotated[int, _GENERATES] = Field(64, ge=1)
    """Tokens to generate for an exact match, at least 1."""
    seed: int = Field(0, ge=0)
    """Seed of the data order, the SVDs, the Kaiming initialisation and dropout."""
    mode: Literal["lora", "full"] = "lora"
    """What is trained. lora: adapters beside a frozen base; full: every weight of the model, under ZeRO-3 or stage 0,
    by the same loop; lora.* and init.* then have no effect. What it leaves is `model/` in place of `adapter/`."""


class DeepSpeedConfig(Group):
    """Where the base weights live."""

    config: Annotated[str, AsPath] = "ds_configs/zero3.json"
    """DeepSpeed JSON with the memory policy only: ZeRO stage 0 (replicated) or 3 (partitioned), offload, buckets."""
    shard_group: Annotated[
        Literal["world", "node"],
        only_with("train.mode", "lora", otherwise="keeps a frozen base: train.mode full needs world. Leave it out."),
        Effect(
            ("deepspeed.config",),
            lambda path: _stage_of(path) != 0,
            "has no effect at stage 0, where every rank holds the base. Leave it out, or give a stage 3 JSON.",
        ),
    ] = "world"
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
    def persistence_threshold(self) -> int:
        """Elements below which ZeRO-3 keeps a parameter whole on every rank; DeepSpeed's default where it is open."""
        return int(self.zero.get("stage3_param_persistence_threshold", 100_000))

    @property
    def offloads(self) -> bool:
        """Is the base kept in host memory?"""
        return (self.zero.get("offload_param") or {}).get("device", "none") != "none"


class CheckpointConfig(Group):
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


class CommConfig(Group):
    """How long ranks wait for each other."""

    rendezvous_seconds: float = Field(300.0, ge=5)
    """Seconds for all ranks to arrive at the start, at least 5; slow file systems make late ranks."""
    init_timeout_seconds: float = Field(7200.0, ge=30)
    """Time-out of a collective while loading and initialising, at least 30."""
    timeout_seconds: float = Field(1800.0, ge=30)
    """Time-out of a collective while training, at least 30."""
    lost_after_seconds: float = Field(20.0, ge=4, le=50)
    """Seconds without an answer of a host's network after which it counts as lost and the job ends, 4 to 50."""


class Config(Group):
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
    resume: Annotated[str, AsPath] = "auto"
    """auto: go on from the newest whole checkpoint of output_dir, if there is one; never: refuse a folder that holds a
    run; or a checkpoint's folder (.../checkpoints/step-N) to start from while output_dir has none of its own."""
    output_dir: Annotated[str, AsPath]
    """Folder of the run, on a file system that all hosts share: created, gone on with, or refused if it holds anything
    else."""

    @property
    def gamma(self) -> float:
        """The scale in force: ``init.gamma``, or the method's own default."""
        return self.init.gamma if self.init.gamma is not None else DEFAULT_GAMMA.get(self.init.method, 1.0)

    @property
    def init_micro_batch_size(self) -> int:
        """Of the gradient phase: ``init.micro_batch_size``, or training's."""
        return self.init.micro_batch_size or self.train.micro_batch_size

    @property
    def scaling(self) -> float:
        """s in W + s B A of the layers that no pattern names: alpha / r, or alpha / sqrt(r) under rsLoRA."""
        return self.lora.scale(self.lora.r, self.lora.alpha)

    @property
    def preconditioner(self) -> tuple[str, float | None]:
        """Form and damping in force; what trains no pair has none."""
        pairs = self.train.mode == "lora" and self.lora.kind in PAIR_KINDS
        return (self.optim.form, self.optim.damping_in_force) if pairs else ("none", None)

    @property
    def changes_base(self) -> bool:
        """Does the run's initialisation change the base, so that ``W + s B0 A0`` is what it was?"""
        is_method = self.train.mode == "lora" and self.init.adapter is None
        return is_method and self.init.method in COMPENSATED_METHODS

    def to_yaml(self) -> str:
        """The resolved config, defaults included, as YAML that :func:`load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
