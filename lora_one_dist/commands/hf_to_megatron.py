"""Convert a Hugging Face model to Megatron-core's distributed checkpoint format (torch_dist).

    python tools/hf_to_megatron.py llama --out llama_megatron --tp 4 --pp 2

Llama 2/3, Mistral, Qwen2, Qwen3; types are kept, bit for bit. The checkpoint holds whole tensors, so that it loads at
any tensor- and pipeline-parallel size. --tp sets how it is cut, and so which bytes a rank reads, and with
--make_vocab_size_divisible_by how far the vocabulary is padded: start Megatron with the same padded size.

Megatron-LM: --load llama_megatron --ckpt-format torch_dist --use-checkpoint-args. config.json and the tokenizer are in
llama_megatron/hf, where tools/megatron_to_hf.py finds them (--tokenizer-type HuggingFaceTokenizer --tokenizer-model
llama_megatron/hf).
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import files, megatron_model


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("model", type=paths.argument, help="folder with config.json and safetensors")
    command_line.add_out(parser)
    parser.add_argument(
        "--tp", type=command_line.positive, default=1, help="tensor-parallel size that will load it (1)"
    )
    parser.add_argument(
        "--pp", type=command_line.positive, default=1, help="pipeline-parallel size that will load it (1)"
    )
    parser.add_argument(
        "--make_vocab_size_divisible_by",
        type=command_line.positive,
        default=128,
        help="times --tp, as Megatron's (128)",
    )
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    planned = megatron_model.plan_to_megatron(
        arguments.model, arguments.tp, arguments.pp, arguments.make_vocab_size_divisible_by
    )
    return command_line.carry_out(planned, megatron_model.run_to_megatron, arguments.out, arguments.dry_run)
