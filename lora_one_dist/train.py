"""The story of a run: check, load, initialise, train, write.

In: a :class:`Config`, on every rank of a launched job.  Out: the run folder.  Every function here runs on every rank.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars

from lora_one_dist import checkpoint, comm, data, gradient, initialize, metrics, model, optim, spectral
from lora_one_dist.config import COMPENSATED_METHODS, GRADIENT_METHODS, Config
from lora_one_dist.sharding import Base

GENERATION_BATCH = 32  # prompts answered at a time for exact match


class TrainError(RuntimeError):
    """Training cannot go on: non-finite loss."""


def run(config: Config) -> dict[str, Any]:
    """Run a config to its end.  Collective, between ``comm.init`` and ``comm.shutdown``.

    Returns:
        The summary that the run folder holds as summary.json.
    """
    if comm.rank() != 0:
        disable_progress_bars()
    root = Path(config.output_dir)
    with comm.all_or_none("checking the output folder"):
        if comm.rank() == 0:
            metrics.refuse_used_folder(root)
    inputs = _read_inputs(config)
    with comm.all_or_none("creating the run folder"):
        record = metrics.RunFolder(root, writes=comm.rank() == 0)
        if record.writes:
            record.write_json("run.json", metrics.describe_run(config, comm.launch()))
            (root / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    _introduce(config, inputs, record)

    phases = metrics.Phases()
    with phases("load"):
        progress = partial(record.progress, "load, tensors")
        base = model.load(config.model, config.deepspeed, inputs.plan, config.train.micro_batch_size, progress)
    torch.manual_seed(spectral.seed_of(config.train.seed, "dropout", comm.rank()) % 2**63)

    before: dict[str, Any] = {}
    if config.train.max_steps != 0:
        with phases("evaluate before"):
            before = _evaluate(base, config, inputs, record, answers=True)
        record.log(0, before)
    adapters, initial = _initialise(base, config, inputs, record, phases)
    after = before
    if config.train.max_steps != 0:
        comm.set_timeout(config.comm.timeout_seconds)
        with phases("train"):
            steps = _train(base, adapters, config, inputs, record)
        with phases("evaluate after"):
            after = _evaluate(base, config, inputs, record, answers=True)
        record.log(steps, after)
        with comm.all_or_none("writing the adapter"):
            if record.writes:
                checkpoint.export(root / "adapter", config, adapters, inputs.plan.targets, initial)
    summary = {"before": before, "after": after, "phases": phases.over_ranks()}
    record.write_json("summary.json", summary)
    _conclude(config, summary, record)
    record.close()
    return summary


@dataclass
class _Inputs:
    """What is read before any weight."""

    plan: model.Plan
    tokenizer: Any
    train: data.TokenData
    eval: data.TokenData | None
    prompts: list[tuple[list[int], str]]
    given: initialize.Pairs | None


def _read_inputs(config: Config) -> _Inputs:
    """Everything that can be refused without a weight: model plan, tokenizer, data, given adapter."""
    folder = model.local_folder(config.model.path, config.model.trust_remote_code)
    with comm.all_or_none("checking the model"):
        needed = initialize.singular_vectors_needed(config.init.method, config.lora.r) if not config.init.adapter else 0
        plan = model.plan(folder, config.model, config.lora, needed)
        model.check_loadable(plan, config.deepspeed.shard_group)
        tokenizer = data.load_tokenizer(str(folder), config.model.trust_remote_code)
        model.check_tokenizer(plan.skeleton, tokenizer)
    with comm.all_or_none("reading the data"):
        rows = data.load_rows(config.data.train, config.data.train_split, config.data.max_train_samples)
    # Nothing may fail between the agreement and the turns: local_first is a collective of its own.
    with comm.all_or_none("tokenizing the data"):
        with comm.local_first():
            train = data.tokenize(rows, tokenizer, config.data)
        _refuse_too_few(config, len(train))
        _refuse_long_warmup(config, len(train))
    held_out, prompts = None, []
    if config.data.eval is not None:
        with comm.all_or_none("reading the evaluation data"):
            rows = data.load_rows(config.data.eval, config.data.eval_split, config.data.max_eval_samples)
        with comm.all_or_none("tokenizing the evaluation data"):
            with comm.local_first():
                held_out = data.tokenize(rows, tokenizer, config.data)
            answered = range(min(config.train.exact_match_samples, len(rows)))
            prompts = data.load_eval_prompts(rows, tokenizer, config.data, answered)
            _refuse_unmatched(config.train.exact_match_pattern, prompts)
    given = None
    if config.init.adapter is not None:
        with comm.all_or_none("reading the adapter"):
            given = checkpoint.read_adapter(Path(config.init.adapter), config, plan.targets)
    return _Inputs(plan, tokenizer, train, held_out, prompts, given)


def _refuse_too_few(config: Config, available: int) -> None:
    needed = {"train.global_batch_size": config.train.global_batch_size} if config.train.max_steps != 0 else {}
    if config.init.adapter is None and config.init.method in GRADIENT_METHODS:
        needed["init.num_samples"] = config.init.num_samples
    for key, count in needed.items():
        if count > available:
            raise data.DataError(f"{key} = {count}: the training data has {available} samples. Lower it or add data.")


def _refuse_unmatched(pattern: str | None, prompts: Sequence[tuple[list[int], str]]) -> None:
    for row, (_, reference) in enumerate(prompts):
        if not _answer(reference, pattern):
            raise data.DataError(
                f"train.exact_match_pattern = {pattern!r}: finds no answer in the completion of evaluation row {row}, "
                f"{reference!r:.80}. Correct the pattern, or leave it out to compare whole completions."
            )


def _total_steps(config: Config, num_samples: int) -> int:
    if config.train.max_steps is not None:
        return config.train.max_steps
    return math.ceil((config.train.epochs or 0) * data.steps_per_epoch(num_samples, config.train.global_batch_size))


def _refuse_long_warmup(config: Config, num_samples: int) -> None:
    total, warmup = _total_steps(config, num_samples), config.optim.warmup_steps
    if 0 < total <= warmup:
        raise data.DataError(
            f"optim.warmup_steps = {warmup}: the run has {total} steps, so optim.lr would never be reached. Lower it."
        )


def _introduce(config: Config, inputs: _Inputs, record: metrics.RunFolder) -> None:
    plan, train = inputs.plan, inputs.train
    shared_by = "the ranks" if config.deepspeed.shard_group == "world" else "the ranks of each host"
    where = f"partitioned over {shared_by} (ZeRO-3)" if config.deepspeed.stage == 3 else "on every rank (stage 0)"
    how = "each rank reads its own slices" if plan.sources is not None else "from_pretrained: tensor names differ"
    launch, hosts = comm.launch(), comm.num_hosts()
    on = "1 host" if hosts == 1 else f"{hosts} hosts"
    record.say(f"{launch.world_size} ranks on {on}, {comm.device().type}, launched by {launch.source}")
    record.say(f"base {config.model.path} {config.model.dtype}, {where}; {how}")
    record.say(f"{len(plan.targets)} target layers, r {config.lora.r}, scale {config.scaling:.4g}")
    for purpose, tokens in (("training", train), ("evaluation", inputs.eval)):
        if tokens is not None:
            record.say(
                f"{len(tokens)} {purpose} samples, {tokens.num_tokens} tokens, {tokens.num_targets} targets; "
                f"{tokens.num_truncated} cut at {config.data.max_length} tokens, {tokens.num_without_targets} without "
                "targets dropped"
            )
    positions = getattr(plan.skeleton.config, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        record.say(f"warning: data.max_length = {config.data.max_length}, but the model was made for {positions}.")


def _initialise(
    base: Base, config: Config, inputs: _Inputs, record: metrics.RunFolder, phases: metrics.Phases
) -> tuple[list[model.Adapter], initialize.Pairs | None]:
    """Adapters set and checked; and A0, B0 as set where the method changed the base."""
    method, targets = config.init.method, inputs.plan.targets
    indices = data.global_batch(len(inputs.train), config.init.num_samples, 0, config.train.seed)
    samples = [inputs.train.dataset[i] for i in indices]
    parts = 2 if config.init.halves and method in GRADIENT_METHODS and len(samples) > 1 else 1
    size, pad = config.train.micro_batch_size, inputs.tokenizer.pad_token_id
    batch = gradient.deal_micro_batches(samples, size, config.init.average, parts, pad)
    if inputs.given is None:
        result = initialize.initial_pairs(base, targets, config, batch, record.progress, phases)
    else:
        result = initialize.Initialisation(inputs.given)
    whole = [micro_batch for part in batch for micro_batch in part]
    with phases("set adapters"):
        before = result.loss if result.loss is not None else initialize.batch_loss(base, whole)
        description = model.peft_config(config.lora, targets, config.model.path)
        adapters = model.inject_adapters(base, description, targets, config.model.dtype)
        compensates = inputs.given is None and method in COMPENSATED_METHODS
        lost = initialize.set_adapters(base, adapters, result.pairs, config.scaling, compensates)
        after = initialize.batch_loss(base, whole)
    record.say(f"loss of the init batch: {before:.6f} before, {after:.6f} with the adapters set")
    if inputs.given is None:
        initialize.check_loss(before, after, config)
    for row in result.rows:
        row["base_rounding"] = lost.get(row["name"])
    targets_seen = sum(sample["num_targets"] for sample in samples)
    tokens = targets_seen if method in GRADIENT_METHODS else 0  # pissa takes no gradient
    for line in metrics.init_summary(result.rows, tokens, config.lora.r):
        record.say(line)
    initial = None  # as set, kept on the host of the one rank that exports
    if compensates:
        initial = {a.target.name: (a.A.detach().cpu().clone(), a.B.detach().cpu().clone()) for a in adapters}
        initial = initial if record.writes else {}
    with comm.all_or_none("writing the initial adapter and its report"):
        if record.writes:
            checkpoint.export(record.root / "adapter_init", config, adapters, targets, initial)
            loss = {"loss_before": before, "loss_after": after, "target_tokens": targets_seen}
            record.write_json("init_report.json", {"method": method, **loss, "layers": result.rows})
            metrics.plot_report(result.rows, record.root / "init_report.png", config.lora.r)
    return adapters, initial


def _train(
    base: Base, adapters: Sequence[model.Adapter], config: Config, inputs: _Inputs, record: metrics.RunFolder
) -> int:
    """The loop: batch, forward and backward, step, log.  Returns the number of steps."""
    optimizer = optim.LayerShardedOptimizer(adapters, config.optim)
    train, size = config.train, config.train.global_batch_size
    num_targets = np.asarray(inputs.train.dataset["num_targets"])
    total = _total_steps(config, len(inputs.train))
    base.module.train()
    started, tokens_since, steps_since = time.monotonic(), 0.0, 0
    for step in range(total):
        indices = data.global_batch(len(inputs.train), size, step, train.seed)
        began = time.monotonic()
        loss, tokens = _forward_backward(base, indices, int(num_targets[indices].sum()), config, inputs)
        compute_seconds = time.monotonic() - began
        rate = optim.learning_rate(step, total, config.optim)
        norm = optimizer.step(rate)
        loss, tokens = comm.all_sum(torch.tensor([loss, tokens], dtype=torch.float64)).tolist()
        if not math.isfinite(loss):
            raise TrainError(f"the loss of step {step + 1} is {loss}, samples {indices[:8]}... Lower optim.lr.")
        tokens_since, steps_since = tokens_since + tokens, steps_since + 1
        if (step + 1) % train.log_steps == 0 or step + 1 == total:
            seconds = time.monotonic() - started
            values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": tokens_since / seconds}
            values |= {"step_seconds": seconds / steps_since, **_rank_spread(compute_seconds)}
            record.log(step + 1, values)
            left = seconds / steps_since * (total - step - 1)
            record.say(
                f"step {step + 1}/{total}  loss {loss:.4f}  grad norm {norm:.3g}  lr {rate:.2e}  "
                f"{values['tokens_per_second']:.0f} tokens/s  {left:.0f} s left"
            )
            started, tokens_since, steps_since = time.monotonic(), 0.0, 0
        if train.eval_steps and (step + 1) % train.eval_steps == 0 and step + 1 < total:
            values = _evaluate(base, config, inputs, record, answers=False)
            record.log(step + 1, values)
            record.say(f"step {step + 1}/{total}  eval loss {values['eval_loss']:.4f}")
            base.module.train()
            started, tokens_since, steps_since = time.monotonic(), 0.0, 0
    return total


def _forward_backward(
    base: Base, indices: Sequence[int], targets: int, config: Config, inputs: _Inputs
) -> tuple[float, int]:
    """This rank's micro-batches of one global batch.  Returns its part of the mean loss and its number of tokens."""
    loss, tokens = torch.zeros((), dtype=torch.float64, device=comm.device()), 0
    size, pad = config.train.micro_batch_size, inputs.tokenizer.pad_token_id
    for positions in data.deal(len(indices), size, comm.world_size(), comm.rank()):
        # A rank without a micro-batch of its own runs a weightless copy: the collectives inside need every rank.
        samples = [inputs.train.dataset[indices[i]] for i in positions or [0]]
        batch = data.collate(samples, pad, weightless=not positions)
        part = model.loss_sum(base.module, batch) / targets
        part.backward()
        base.release()
        loss += part.detach()
        tokens += int(batch["attention_mask"].sum()) if positions else 0
    return float(loss), tokens


def _rank_spread(compute_seconds: float) -> dict[str, Any]:
    """Slowest and fastest rank of the last step, and the largest memory.  Collective."""
    seconds = comm.all_gather_floats(compute_seconds)
    slowest, fastest = max(seconds), min(seconds)
    return {
        "slowest_rank": seconds.index(slowest),
        "slowest_rank_seconds": slowest,
        "fastest_rank": seconds.index(fastest),
        "fastest_rank_seconds": fastest,
        "peak_bytes": int(max(comm.all_gather_floats(metrics.peak_bytes()))),
    }


def _evaluate(base: Base, config: Config, inputs: _Inputs, record: metrics.RunFolder, answers: bool) -> dict[str, Any]:
    """Mean loss over the target tokens of the evaluation data and, with ``answers``, exact match."""
    if inputs.eval is None:
        return {}
    base.module.eval()
    loss = torch.zeros((), dtype=torch.float64)
    size, pad = config.train.micro_batch_size, inputs.tokenizer.pad_token_id
    with torch.no_grad():
        dealt = data.deal(len(inputs.eval), size, comm.world_size(), comm.rank())
        for done, positions in enumerate(dealt, start=1):
            samples = [inputs.eval.dataset[i] for i in positions or [0]]
            loss += model.loss_sum(base.module, data.collate(samples, pad, weightless=not positions)).double().cpu()
            record.progress("evaluate, micro-batches", done, len(dealt))
        values = {"eval_loss": float(comm.all_sum(loss)) / inputs.eval.num_targets}
        if answers and inputs.prompts:
            values["exact_match"] = _exact_match(base, config, inputs, record)
    return values


def _exact_match(base: Base, config: Config, inputs: _Inputs, record: metrics.RunFolder) -> float:
    """Share of held-out prompts whose greedy answer equals the reference's, in [0, 1]."""
    pattern, tokenizer = config.train.exact_match_pattern, inputs.tokenizer
    right = torch.zeros((), dtype=torch.float64)
    dealt = data.deal(len(inputs.prompts), GENERATION_BATCH, comm.world_size(), comm.rank())
    for done, positions in enumerate(dealt, start=1):
        asked = [inputs.prompts[i] for i in positions or [0]]
        width = max(len(ids) for ids, _ in asked)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids, _ in asked])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in asked])
        written = base.module.generate(
            input_ids=ids.to(comm.device()),
            attention_mask=mask.to(comm.device()),
            max_new_tokens=config.train.exact_match_max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            repetition_penalty=1.0,
            # transformers does not know of our partitioning: ranks that finish early must keep gathering.
            synced_gpus=base.partitioned and comm.world_size() > 1,
        )
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        if positions:
            answers = zip(texts, (reference for _, reference in asked), strict=True)
            right += sum(_answer(text, pattern) == _answer(reference, pattern) for text, reference in answers)
        record.progress("exact match, batches of answers", done, len(dealt))
    return float(comm.all_sum(right)) / len(inputs.prompts)


def _answer(text: str, pattern: str | None) -> str:
    """The last match of the pattern (its first group, if any), or the whole text, stripped; no match is ''."""
    if pattern is None:
        return text.strip()
    found = [match.group(1) if match.re.groups else match.group() for match in re.finditer(pattern, text)]
    return (found[-1] or "").strip() if found else ""


def _conclude(config: Config, summary: dict[str, Any], record: metrics.RunFolder) -> None:
    names = {"eval_loss": "held-out loss", "exact_match": "held-out exact match"}
    compared = [
        (names[key], summary["before"].get(key), summary["after"].get(key)) for key in names if key in summary["after"]
    ]
    title = f"{config.init.adapter or config.init.method}, r {config.lora.r}, {comm.world_size()} ranks"
    record.say(metrics.final_table(title, compared, summary["phases"]))
    written = {"report": "init_report.png", "TensorBoard log": "tensorboard"}
    written["initial adapter"] = "adapter_init"
    if config.train.max_steps != 0:
        written["adapter"] = "adapter"
    record.say("")
    for what, name in reversed(written.items()):
        if (record.root / name).exists():
            record.say(f"  {what + ':':<18}{record.root / name}")
