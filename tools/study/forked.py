"""Runs of a sweep in processes that have imported everything already: a study of small models spends half of its time
on imports.

In: :class:`sweep.Point`.  Out: what the same scripts write when each is started by itself.  CPU only.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from lora_one_dist.commands import sweep

PRELOADED = ["torch", "transformers", "datasets", "lora_one_dist.run.story", "tools.study.train_form"]


class Forked:
    """One run; to :func:`sweep.run` what subprocess.Popen is."""

    def __init__(self, point: sweep.Point, environment: Mapping[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(
            target=_run, args=(point.script, point.arguments, point.log, dict(environment)), daemon=True
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode


def start(point: sweep.Point, ranks: int, slot: Mapping[str, str]) -> Forked:
    """For :func:`sweep.run`."""
    if ranks != 1:
        raise ValueError(f"ranks {ranks}: a forked run is one process")
    point.folder.parent.mkdir(parents=True, exist_ok=True)
    return Forked(point, slot)


def _run(script: Path, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ |= environment
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
