"""A script whose peaks are those of live tensor bytes instead of resident memory, which has the imports in it.

    python tools/bench/counted.py launch/train.py --config ...      started as the script itself would be

For scripts that tell their peaks by :mod:`lora_one_dist.run.metrics`.  A tensor counts from its first use on.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils._pytree import tree_leaves

from lora_one_dist.run import metrics
from tools.bench.tensor_bytes import TensorBytes


class UsedBytes(TensorBytes):
    """Counts what operations are given, too: weights that a loader has made out of torch's sight."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._add(leaf)
        return super().__torch_dispatch__(func, types, args, kwargs)


def main() -> None:
    # The launcher puts --local_rank first.
    script = next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    sys.argv = [script, *(argument for argument in sys.argv[1:] if argument != script)]
    counted = UsedBytes()

    def reset() -> None:
        counted.peak = counted.live

    metrics.peak_bytes, metrics.reset_peak_bytes = lambda: counted.peak, reset
    with counted:
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
