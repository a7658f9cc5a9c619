"""ZeRO-1, 2 and 3 checkpoints by HF Trainer + PEFT, and what the live adapters held.

    python tests/peers/zero_checkpoints.py N MODEL_FOLDER OUT

on N ranks, which are forked once all is imported and meet at MASTER_ADDR and MASTER_PORT.
Below OUT/stage-N: checkpoint-2 as the Trainer leaves it, plain/ as engine.save_checkpoint without frozen weights does,
accelerate/ as Accelerate's save_state does, and live/: the adapter gathered from the model, in PEFT's format.
Below OUT/resized the same of ZeRO-3 with a larger vocabulary, trained whole, and a tokenizer that has it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in base/sharding.py: no C++ build on a CPU

from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

TOKENS, STEPS = 12, 2
VOCABULARY = 70  # of the resized one
LORA: dict[str, dict[str, Any]] = {  # odd ranks: no number of ranks but 1 divides a parameter
    "stage-1": {"r": 3, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "stage-2": {"r": 5, "target_modules": ["q_proj", "up_proj"], "use_dora": True, "rank_pattern": {"up_proj": 3}},
    "stage-3": {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "resized": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
STAGE = {"stage-1": 1, "stage-2": 2, "stage-3": 3, "resized": 3}
BF16 = ("stage-2", "stage-3")


def live_adapter(model: Any, stage: int) -> dict[str, torch.Tensor]:
    if stage < 3:
        return get_peft_model_state_dict(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trained):
        gathered = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return get_peft_model_state_dict(model, state_dict=gathered)


def train(folder: str, out: Path, name: str) -> None:
    stage, bf16 = STAGE[name], name in BF16
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        bf16=bf16,
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=0.05,
        weight_decay=0.01,
        report_to=[],
        disable_tqdm=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    torch.manual_seed(stage)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "resized":
        tokenizer.add_tokens([f"<new{i}>" for i in range(VOCABULARY - len(tokenizer))])
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = LoraConfig(lora_alpha=6, task_type="CAUSAL_LM", **LORA[name])
    model = get_peft_model(base, settings, autocast_adapter_dtype=False)  # ZeRO-3 takes one type only
    ids = torch.randint(3, 64, (16, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    live = live_adapter(trainer.model, stage)
    trainer.model_wrapped.save_checkpoint(str(out / "plain"), tag="last", exclude_frozen_parameters=True)
    trainer.accelerator.save_state(str(out / "accelerate"))
    if arguments.process_index == 0:
        (out / "live").mkdir()
        save_file(
            {n: t.detach().clone().contiguous() for n, t in live.items()}, out / "live" / "adapter_model.safetensors"
        )
        trainer.model.peft_config["default"].save_pretrained(out / "live")
    AcceleratorState._reset_state(True)  # or the next Trainer would take this one's ZeRO stage


def rank(index: int, folder: str, out: str) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    for name in LORA:
        train(folder, Path(out) / name, name)


if __name__ == "__main__":
    number, *where = sys.argv[1:]
    os.environ |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    torch.multiprocessing.start_processes(rank, where, int(number), start_method="fork")
