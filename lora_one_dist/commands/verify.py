"""Are two checkpoints the same?  Tensor by tensor and, with prompts, by their logits.

    python tools/verify.py runs/mine mine_peft                                  a run's newest adapter and its export
    python tools/verify.py output/checkpoint-500 adapter                        a ZeRO checkpoint and what came of it
    python tools/verify.py merged also_merged --tolerance 1e-6
    python tools/verify.py adapter adapter_r16 --base llama --prompt "2 + 2 =" --tolerance 0.05

Each of the two is a Hugging Face model's folder, a PEFT folder, a run folder or checkpoint of ours, a DeepSpeed ZeRO
checkpoint of a PEFT model, or a Megatron-core checkpoint. With prompts the logits decide: two adapters of different
ranks have different tensors and may compute the same. Prints the largest difference and where it is. Exit code 0: the
same within the tolerance; 2: different; 1: cannot be compared. Where a folder has SHA256SUMS or a manifest, its hashes
are checked too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import compare, export

DIFFERENT = 2  # exit code


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("first", type=paths.argument)
    parser.add_argument("second", type=paths.argument)
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest absolute difference (0: bit for bit)")
    parser.add_argument("--base", type=paths.argument, help="model below two adapters, for logits")
    parser.add_argument(
        "--prompt", action="append", default=[], help="compare the logits of this text; may be repeated"
    )
    parser.add_argument("--prompts", type=paths.argument, help="file with a prompt on each line")
    parser.add_argument("--dtype", choices=sorted(export.DTYPES), default="fp32", help="to compute logits in (fp32)")
    parser.add_argument("--adapter_config", type=paths.argument, help="of a ZeRO checkpoint that has none")
    parser.add_argument("--lora_alpha", type=float, help="of a ZeRO checkpoint without adapter_config.json")
    parser.add_argument(
        "--hf", type=paths.argument, help="config.json's folder of a Megatron checkpoint that has no hf/"
    )
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    opened = [
        compare.open_any(path, arguments.adapter_config, arguments.lora_alpha, arguments.hf)
        for path in (arguments.first, arguments.second)
    ]
    for checkpoint in opened:
        for note in checkpoint.notes or [f"{checkpoint.where}: {checkpoint.kind}, no hashes to check"]:
            print(note)
    found = compare.compare(*opened)
    print("\n".join(compare.report(found, arguments.tolerance)))
    prompts = list(arguments.prompt)
    if arguments.prompts:
        prompts += [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    same = found.equal(arguments.tolerance)
    if prompts:
        same = compare_logits(opened, arguments.base, prompts, arguments) <= arguments.tolerance
    print("same" if same else "different")
    return 0 if same else DIFFERENT


def compare_logits(
    opened: list[compare.Opened], base: Path | None, prompts: list[str], arguments: argparse.Namespace
) -> float:
    """Print where the logits of two checkpoints differ most; returns by how much."""
    first, second = (compare.logits(checkpoint, base, prompts, export.DTYPES[arguments.dtype]) for checkpoint in opened)
    worst = 0.0
    for prompt, x, y in zip(prompts, first, second, strict=True):
        if x.shape != y.shape:
            print(f"logits: {tuple(x.shape)} and {tuple(y.shape)}: {prompt[:60]!r}")
            return float("inf")
        value, index = compare.largest_difference(x, y)
        worst = max(worst, value)
        where = f", token {index[0]}, vocabulary entry {index[1]}" if index else ""
        agree = (x.argmax(-1) == y.argmax(-1)).float().mean()
        print(f"logits: {value:9.3g}{where}; the likeliest token is the same at {agree:.1%}: {prompt[:60]!r}")
    return worst
