"""The same work by what users have today: HF Trainer + PEFT + ZeRO-3.  Started by the deepspeed launcher.

    deepspeed --hostfile ... tools/bench/hf_trainer.py MODEL_FOLDER ZERO_JSON STEPS OUT_JSONL \
        [R SAVE_STEPS TOKENS CHECKPOINTING]

One line of OUT_JSONL per step, with its seconds and peak memory, and, if it saves, one per checkpoint with its, as of
rank 0.
CHECKPOINTING: none, reentrant or non_reentrant.  Micro-batch 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in base/sharding.py: no C++ build on a CPU

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.run import metrics


class Lines(TrainerCallback):
    def __init__(self, path: Path):
        self.path, self.ended, self.seconds = path, time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seconds since the last step's end: all that a step takes, its data and logs too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds, self.ended = time.monotonic() - self.ended, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            with self.path.open("a") as file:
                line = {"step": state.global_step, "loss": logs["loss"], "step_seconds": self.seconds}
                line["peak_bytes"] = metrics.peak_bytes()
                metrics.reset_peak_bytes()  # what comes before a step is not its own
                file.write(json.dumps(line) + "\n")


class TimedTrainer(Trainer):
    """Says how long a checkpoint takes, all ranks together."""

    lines: Path

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        torch.distributed.barrier()
        began = time.monotonic()
        super()._save_checkpoint(*args, **kwargs)
        torch.distributed.barrier()
        if self.args.process_index == 0:
            with self.lines.open("a") as file:
                file.write(json.dumps({"checkpoint_seconds": time.monotonic() - began}) + "\n")


def main(
    folder: str,
    zero_json: str,
    steps: str,
    out: str,
    r: str = "8",
    save_steps: str = "0",
    tokens: str = "16",
    checkpointing: str = "non_reentrant",
) -> None:
    zero = json.loads(Path(zero_json).read_text())
    arguments = TrainingArguments(
        output_dir=f"{out}.trainer",
        use_cpu=not torch.cuda.is_available(),
        max_steps=int(steps),
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
        logging_steps=1,
        report_to=[],
        save_strategy="steps" if int(save_steps) else "no",
        save_steps=int(save_steps) or 1,
        deepspeed={**zero, "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True},
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.enable_input_require_grads()
    model = get_peft_model(
        model, LoraConfig(r=int(r), lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4 * int(steps), int(tokens)), generator=generator)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    trainer = TimedTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[Lines(Path(out))])
    trainer.lines = Path(out)
    trainer.train()
    sys.stdout.flush()
    os._exit(0)  # interpreter teardown beside gloo's threads aborts a rank now and then


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
