"""Convert a Megatron-core distributed checkpoint (torch_dist) of a Llama, Mistral or Qwen to a Hugging Face model.

    python tools/megatron_to_hf.py llama_megatron --out llama
    python tools/megatron_to_hf.py checkpoints/iter_0001000 --hf original_llama --out llama

Saved at any tensor- and pipeline-parallel size; optimizer states are left out, types are kept. config.json and the
tokenizer come from --hf, or from the checkpoint's own hf folder, where tools/hf_to_megatron.py puts them.
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import files, megatron_model


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("checkpoint", type=paths.argument, help="folder of the checkpoint, or of one of its iterations")
    command_line.add_out(parser)
    parser.add_argument(
        "--hf", type=paths.argument, help="folder with the model's config.json and tokenizer (CHECKPOINT/hf)"
    )
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    planned = megatron_model.plan_to_hf(arguments.checkpoint, arguments.hf)
    return command_line.carry_out(planned, megatron_model.run_to_hf, arguments.out, arguments.dry_run)
