"""Merge a PEFT adapter into its base: sharded safetensors in, the same shards out, nothing whole in memory.

    python tools/merge_adapter.py /models/Llama-2-7b-hf runs/mine/adapter --out /models/mine

Takes LoRA with rsLoRA, rank_pattern, alpha_pattern, DoRA, modules_to_save, trainable_token_indices, lora_bias, bias,
target_parameters, fan_in_fan_out (Conv1D), on linear and embedding layers, also where the vocabulary was resized. The
sum W + scale * B A is taken in fp32 and rounded once to the base's type. Shards, index and config are the base's, and
so are tokenizer and chat template where the adapter's folder has no other; SHA256SUMS is added. Tied embeddings that
the adapter tells apart are untied.

Memory for each worker: one tensor and its delta in fp32 (at 70B 2 GB for the largest MLP matrix), or the embedding as
it is stored. The folder appears when it is whole, and never replaces another.
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import files, merge


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("base", type=paths.argument, help="folder of the base model, safetensors")
    parser.add_argument(
        "adapter", type=paths.argument, help="PEFT folder: adapter_config.json, adapter_model.safetensors"
    )
    command_line.add_out(parser)
    parser.add_argument("--device", default="cpu", help="where the sums are taken: cpu (default), cuda, cuda:1")
    parser.add_argument(
        "--workers", type=command_line.positive, default=1, help="shards worked on at a time (1); memory times as many"
    )
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    planned = merge.plan(arguments.base, arguments.adapter, arguments.device)
    print(f"{arguments.base} + {arguments.adapter} -> {arguments.out}")
    print(f"{len(planned.shards)} files, {files.readable(files.num_bytes(planned.shards))}")
    for note in planned.notes:
        print(note)
    if arguments.dry_run:
        files.refuse_full_disk(arguments.out, files.num_bytes(planned.shards))
        return 0
    merge.run(planned, arguments.out, arguments.workers)
    print(f"written: {arguments.out}")
    return 0
