"""Lay a PEFT LoRA adapter out as Megatron-Bridge's, so that training goes on there.

    python tools/peft_to_megatron.py adapter --base llama --out adapter_megatron --tp 4 --pp 2

--form canonical keeps q, k, v, gate and up apart (Bridge's CanonicalLoRA): what comes back with
tools/megatron_to_peft.py has the same bits. --form fused is Bridge's LoRA: exact too, but where PEFT's adapters share
no A it takes them in blocks, at the sum of their ranks. The classes and options to use in Bridge are printed, and are
in release/run_config.yaml. --tp and --pp must be those of the training that loads it.

A run of this project: export it first, with tools/export_adapter.py. The base: tools/hf_to_megatron.py.
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import files, megatron_lora


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("adapter", type=paths.argument, help="PEFT folder")
    parser.add_argument("--base", type=paths.argument, required=True, help="folder with the config.json of its model")
    command_line.add_out(parser)
    parser.add_argument(
        "--tp", type=command_line.positive, default=1, help="tensor-parallel size that will load it (1)"
    )
    parser.add_argument(
        "--pp", type=command_line.positive, default=1, help="pipeline-parallel size that will load it (1)"
    )
    parser.add_argument("--form", choices=list(megatron_lora.CLASSES), default=megatron_lora.CANONICAL)
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    planned = megatron_lora.plan_to_megatron(
        arguments.adapter, arguments.base, arguments.tp, arguments.pp, arguments.form
    )
    return command_line.carry_out(planned, megatron_lora.run_to_megatron, arguments.out, arguments.dry_run)
