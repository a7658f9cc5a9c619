"""Convert Megatron-Bridge's LoRA adapters (LoRA or CanonicalLoRA, torch_dist) to a PEFT folder.

    python tools/megatron_to_peft.py adapter_megatron --out adapter
    python tools/megatron_to_peft.py checkpoints/iter_0001000 --hf llama --out adapter

Of LoRA's fused adapters B is split and A repeated, which computes the same. Rank and alpha are in the checkpoint's
run_config.yaml; config.json comes from --hf, or from the checkpoint's own hf folder, where tools/peft_to_megatron.py
puts it.
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import files, megatron_lora


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("checkpoint", type=paths.argument, help="folder of the checkpoint, or of one of its iterations")
    command_line.add_out(parser)
    parser.add_argument("--hf", type=paths.argument, help="folder with the base's config.json (CHECKPOINT/hf)")
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    planned = megatron_lora.plan_to_peft(arguments.checkpoint, arguments.hf)
    return command_line.carry_out(planned, megatron_lora.run_to_peft, arguments.out, arguments.dry_run)
