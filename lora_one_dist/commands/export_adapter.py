"""Export the adapter of a run as the PEFT folder that your server takes.

    python tools/export_adapter.py runs/mine --out mine_r8                    newest checkpoint, as it is
    python tools/export_adapter.py runs/mine --step 300 --out mine_r8
    python tools/export_adapter.py runs/ga --rank 16 --dtype bf16 --out ga_r16

init.method lora_one leaves the base untouched: its adapter has rank r. lora_one_v1, lora_ga and pissa change the base,
so that theirs has rank 2r, exactly, on the untouched base. --rank truncates by an SVD and reports the error of each
layer, in export_report.json too.

Servers limit the rank: vLLM takes adapters up to its --max-lora-rank, 16 by default, which must be one of 1, 8, 16, 32,
64, 128, 256, 320 and 512 (older versions: 8 to 256). An adapter of r 8 that was exported with rank 16 still fits the
default; with r 16 start vLLM with --max-lora-rank 32, or export with --rank 16.
"""

from __future__ import annotations

import argparse

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import export, files


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "source", type=paths.argument, help="run folder, checkpoint (checkpoints/step-N) or PEFT folder"
    )
    command_line.add_out(parser)
    parser.add_argument("--step", type=int, help="checkpoint of the run folder (the newest)")
    parser.add_argument("--rank", type=command_line.positive, help="truncate to this rank (keep it)")
    parser.add_argument("--dtype", choices=sorted(export.DTYPES), help="type to write (keep it)")
    parser.add_argument(
        "--masters", action="store_true", help="take the optimizer's fp32 weights, not the copies of the run's dtype"
    )
    return parser.parse_args(argv)


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    files.refuse_existing(arguments.out)
    dtype = export.DTYPES[arguments.dtype] if arguments.dtype else None
    planned = export.plan(arguments.source, arguments.rank, dtype, arguments.masters, arguments.step)
    for note in planned.notes:
        print(note)
    print(f"{arguments.source} -> {arguments.out}: rank {planned.r}, {files.readable(planned.num_bytes)}")
    if arguments.dry_run:
        files.refuse_full_disk(arguments.out, planned.num_bytes)
        return 0
    rows = export.run(planned, arguments.out)
    if rows:
        print(export.table(rows))
    print(f"written: {arguments.out}")
    return 0
