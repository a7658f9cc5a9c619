"""Forked runs give a sweep what processes of their own give it: exit codes, logs, threads, an end when asked."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from lora_one_dist.commands import sweep
from tools.study import forked

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
folder = Path(sys.argv[sys.argv.index("--config") + 1]).parent / "run"
print("threads", torch.get_num_threads(), os.getpgid(0) == os.getpid(), os.environ["OMP_NUM_THREADS"], flush=True)
if "fail" in sys.argv:
    raise ValueError("no such thing")
while "wait" in sys.argv:
    time.sleep(0.1)
folder.mkdir()
(folder / "done.json").write_text(json.dumps(sys.argv[1:]))
sys.stdout.flush()
os._exit(0)
"""


class Made(sweep.Point):
    """A point whose result is the file that the script writes."""

    def summary(self):
        path = self.log.with_name("run") / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None


def point(tmp_path: Path, name: str, *words: str) -> sweep.Point:
    (tmp_path / name).mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)

    class Placed(Made):
        folder = tmp_path / name / "folder"

    return Placed(name, {}, None, ("--config", str(tmp_path / name / "x.yaml"), *words), tmp_path / "script.py")


def test_runs_end_fail_and_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(forked, "PRELOADED", ["json"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    good, bad = point(tmp_path, "good"), point(tmp_path, "bad", "fail")
    failed = sweep.run([good, bad], 2, say=lambda line: None, start=forked.start)
    assert set(failed) == {"bad"}
    assert "ValueError: no such thing" in failed["bad"]
    assert good.log.read_text() == "threads 1 True 1\n"
    assert good.summary() == list(good.arguments)

    long = forked.start(point(tmp_path, "long", "wait"), 1, {"OMP_NUM_THREADS": "1"})
    log, deadline = tmp_path / "long" / "long.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert long.poll() is None
    sweep._end([long])
    assert long.returncode == -15
    assert not os.path.exists(f"/proc/{long.pid}")
