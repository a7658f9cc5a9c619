"""Full fine-tuning of the same config, by the plain HF Trainer: the yardstick of the study.

    python tools/study/full.py --config runs/study/gap.yaml optim.lr=1e-3 output_dir=runs/full

In: a config of launch/train.py, whose adapters, initialisation and preconditioner are not used.  Out:
config.yaml, metrics.jsonl and summary.json as launch/train.py writes them.  Tokens, batches and their order, schedule,
clipping and evaluation are those of launch/train.py; the loop, the optimizer and the loss are transformers'.  Every
weight is trained, embeddings too.  One process; one that was cut off starts again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a plain checkout too

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lora_one_dist.base import loading
from lora_one_dist.cluster import comm
from lora_one_dist.config.reading import load_config
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches
from lora_one_dist.run import inputs, metrics
from lora_one_dist.train import evaluate


class Lines(TrainerCallback):
    """What launch/train.py logs of a step, as far as the study reads it."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.write(state.global_step, {"loss": logs["loss"], "lr": logs["learning_rate"]})


def arguments(config: Config, steps: int) -> TrainingArguments:
    """The config's optimizer and schedule, in transformers' words."""
    optim = config.optim
    return TrainingArguments(
        output_dir=str(Path(config.output_dir) / "trainer"),
        use_cpu=comm.device().type == "cpu",
        max_steps=steps,
        per_device_train_batch_size=config.train.global_batch_size,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=optim.lr,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_steps,
        logging_steps=config.train.log_steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # comm.init makes a process group, for which Trainer wraps the model in DDP
        seed=config.train.seed,
    )


def run(config: Config) -> dict[str, Any]:
    """Evaluate, train every weight, evaluate.  Between ``comm.init`` and ``comm.shutdown``."""
    root = Path(config.output_dir)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    read = inputs.read(config)
    steps = inputs.total_steps(config.train, len(read.train))
    phases, lines = metrics.Phases(), Lines(root / "metrics.jsonl")
    (root / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    with phases("load"):
        base = loading.load(config.model, config.deepspeed, read.plan, config.train.micro_batch_size)
        # The base's own products keep nothing for a weight's gradient.
        model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)

    def evaluated(step: int) -> dict[str, float]:
        assert read.held is not None, "the study's configs name held-out data"
        values = evaluate.evaluate(base, config, read.held, lambda label, done, total: None, answers=True)
        lines.write(step, values)
        return values

    with phases("evaluate before"):
        before = evaluated(0)
    size, pad = config.train.global_batch_size, read.tokenizer.pad_token_id
    order = [i for step in range(steps) for i in batches.global_batch(len(read.train), size, step, config.train.seed)]
    rows = [read.train.dataset[i] for i in order]
    with phases("train"):
        Trainer(
            model=model,
            args=arguments(config, steps),
            train_dataset=rows,
            data_collator=lambda samples: batches.collate(samples, pad),
            callbacks=[lines],
        ).train()
        base.module.load_state_dict(model.state_dict())  # to be evaluated as adapters are
    with phases("evaluate after"):
        after = evaluated(steps)
    summary = {"steps": steps, "before": before, "after": after, "phases": phases.over_ranks()}
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    comm.init(config.comm)
    print(json.dumps(run(config)["after"]))
    comm.shutdown()


if __name__ == "__main__":
    main()
