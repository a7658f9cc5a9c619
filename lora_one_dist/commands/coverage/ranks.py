"""The report as the ranks make it: read, refuse, load, measure, write.  Every function runs on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_one_dist.adapters.tables import put_tables
from lora_one_dist.base import loading
from lora_one_dist.cluster import comm
from lora_one_dist.commands.coverage import tables
from lora_one_dist.commands.coverage.measure import measure
from lora_one_dist.config.initialise import InitConfig
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches
from lora_one_dist.data.errors import DataError
from lora_one_dist.initialise.gradient import num_targets
from lora_one_dist.run import fitting, inputs, metrics


def report(config: Config, counts: Sequence[int], many: int, out: Path) -> None:
    """Measure, and write coverage.json, coverage.md and coverage.png.  Collective.

    Args:
        counts: of samples whose gradient is compared with that of ``many``; rising, none above it.

    Raises:
        RankError, and the errors of a run that cannot begin: on all ranks, before a weight is read.
    """
    teller = metrics.Teller(comm.rank() == 0)
    read = inputs.read(settings_of(config, 1, out))
    with comm.all_or_none("counting the samples"):
        if comm.rank() == 0 and many > len(read.train):  # all find the same: told once
            raise DataError(f"--many {many}: the training data has {len(read.train)} samples. Lower it or add data.")
    planned = settings_of(config, many, out)
    fitted = fitting.fit(planned, read, begins=True)
    teller.say(f"{len(read.plan.targets)} target layers on {comm.world_size()} ranks, {comm.device().type}")
    load = partial(teller.progress, "load, tensors")
    base = loading.load(config.model, config.deepspeed, read.plan, config.train.micro_batch_size, load)
    put_tables(base, read.tables)
    fitted.recompute(base, config.model, "gradient")
    order = batches.global_batch(len(read.train), many, 0, config.train.seed)
    samples = [read.train.dataset[i] for i in order]
    pad = read.tokenizer.pad_token_id
    rows = measure(base, read.plan.targets, planned, samples, counts, pad, teller.progress)
    about = {
        "model": config.model.path,
        "data": config.data.train,
        "many": many,
        "r": config.lora.r,
        "target_tokens": {count: sum(map(num_targets, samples[:count])) for count in [*counts, many]},
        "run": metrics.describe_run(config, comm.launch(), None),
    }
    with comm.all_or_none("writing the report"):
        if comm.rank() == 0:
            _write(about, rows, out)
    for line in tables.answers(rows, many, config.lora.r):
        teller.say(line)
    teller.say(f"written: {out}")


def settings_of(config: Config, num_samples: int, out: Path) -> Config:
    """The run's config as this report takes it: two gradients of the base, and nothing held out, nothing trained."""
    kept = {key: getattr(config.init, key) for key in ("micro_batch_size", "buffer", "layer_groups")}
    return config.model_copy(
        update={
            "init": InitConfig(num_samples=num_samples, halves=True, **kept),
            "data": config.data.model_copy(update={"eval": None}),
            "train": config.train.model_copy(update={"max_steps": 0, "exact_match_samples": 0}),
            "output_dir": str(out),
        }
    )


def _write(about: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    """The folder appears when it is whole."""
    partial_folder = out.with_name(f".{out.name}.partial")
    partial_folder.mkdir(parents=True, exist_ok=True)
    means = {"coverage": tables.coverage_means(rows), "similarity": tables.similarity_means(rows)}
    text = json.dumps({**about, "means": means, "layers": rows}, indent=1)
    (partial_folder / "coverage.json").write_text(text + "\n", encoding="utf-8")
    (partial_folder / "coverage.md").write_text(tables.markdown(about, rows), encoding="utf-8")
    tables.plot(rows, about["many"], about["r"], partial_folder / "coverage.png")
    partial_folder.rename(out)
