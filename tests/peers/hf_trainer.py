"""The same work by what users have today: HF Trainer + PEFT + ZeRO-3.  Started by the deepspeed launcher.

    deepspeed --hostfile ... tests/peers/hf_trainer.py MODEL_FOLDER ZERO_JSON STEPS OUT_JSONL

One line of OUT_JSONL per step, as of rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in lora_one_dist/sharding.py: no C++ build on a CPU

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

R, TOKENS = 8, 16


class Lines(TrainerCallback):
    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in (logs or {}):
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "loss": logs["loss"]}) + "\n")


def main(folder: str, zero_json: str, steps: str, out: str) -> None:
    zero = json.loads(Path(zero_json).read_text())
    arguments = TrainingArguments(
        output_dir=f"{out}.trainer",
        use_cpu=True,
        max_steps=int(steps),
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        deepspeed={**zero, "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True},
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=R, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4 * int(steps), TOKENS), generator=generator)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Lines(Path(out))]).train()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
