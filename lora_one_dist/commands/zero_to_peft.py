"""Take the adapter out of a DeepSpeed ZeRO checkpoint of a PEFT model, as a PEFT folder.

    python tools/zero_to_peft.py output/checkpoint-500 --out adapter                   of HF Trainer
    python tools/zero_to_peft.py saved --tag global_step500 --lora_alpha 16 --out adapter    of engine.save_checkpoint

ZeRO-1, 2 and 3, any number of ranks, with or without the frozen weights; neither DeepSpeed nor the base model is
needed. The optimizer's fp32 masters are read, and rounded to what the model held unless --dtype says otherwise.
adapter_config.json is taken from --adapter_config, else from the checkpoint's folder or above it, else inferred from
the tensors, which do not tell lora_alpha, rsLoRA or alpha_pattern. A tokenizer in or above the checkpoint's folder is
copied. For a run of this project: tools/export_adapter.py.
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import export, files, zero


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "checkpoint", type=paths.argument, help="folder with the file latest, or with the *_optim_states.pt"
    )
    command_line.add_out(parser)
    parser.add_argument("--tag", help="folder inside the checkpoint (what latest says)")
    parser.add_argument("--adapter_name", help="which of several adapters (the only one)")
    parser.add_argument("--adapter_config", type=paths.argument, help="PEFT's adapter_config.json")
    parser.add_argument("--lora_alpha", type=float, help="of the training, where the configuration must be inferred")
    parser.add_argument("--dtype", choices=sorted(export.DTYPES), help="type to write (what the model held)")
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    planned = zero.plan(
        arguments.checkpoint,
        arguments.tag,
        arguments.adapter_name,
        export.DTYPES[arguments.dtype] if arguments.dtype else None,
        arguments.adapter_config,
        arguments.lora_alpha,
    )
    return command_line.carry_out(planned, zero.run, arguments.out, arguments.dry_run)
