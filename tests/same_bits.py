"""What must not change when code is moved: losses, gradient norms and hashes of four kinds of run.

    .venv/bin/python tests/same_bits.py before.json         at one commit (four minutes, as root)
    .venv/bin/python tests/same_bits.py after.json          at the other: cmp before.json after.json

The demo to its end; lora_ga in bf16 with dropout and layer groups; a run killed in its sixth step that goes on from its
fourth; two hosts of two ranks with a copy of the base on each.  No test: it compares two checkouts on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import jobs  # noqa: E402
from tests.hosts import Hosts  # noqa: E402

BIN = Path(sys.executable).parent
COMPARED = ("step", "loss", "grad_norm", "lr", "eval_loss", "exact_match")
SHORT = (
    *("train.max_steps=12", "optim.warmup_steps=2", "train.eval_steps=5", "train.log_steps=1"),
    *("train.exact_match_samples=8", "data.max_eval_samples=32", "lora.dropout=0.1"),
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def outcome(run: Path) -> dict[str, Any]:
    """Of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in COMPARED if key in line} for line in lines]
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    files = [run / name / "adapter_model.safetensors" for name in ("adapter_init", "adapter")]
    files += sorted(last.glob("optimizer-*"))
    return {
        "lines": len(kept),
        "last": kept[-1],
        "metrics": sha256(json.dumps(kept).encode()),
        **{str(file.relative_to(run)): sha256(file.read_bytes()) for file in files},
    }


def launch(run: Path, *overrides: str, killed_in_step: int | None = None) -> None:
    """The demo's config on two ranks, to its end or until so many losses are written."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
    command = [BIN / "deepspeed", "--num_gpus", "2", "launch/train.py", "--config", jobs.CONFIG, f"output_dir={run}"]
    with run.with_suffix(".log").open("a") as log:
        job = subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, stdout=log, stderr=log)
        metrics = run / "metrics.jsonl"
        while killed_in_step is not None and job.poll() is None:
            if metrics.exists() and metrics.read_text().count('"loss"') >= killed_in_step:
                launcher = psutil.Process(job.pid)
                for process in (launcher, *launcher.children(recursive=True)):
                    process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        code = job.wait()
    assert killed_in_step is not None or code == 0, run.with_suffix(".log").read_text()[-3000:]


def main() -> None:
    os.chdir(ROOT)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        launch(root / "demo")
        launch(root / "lora_ga_bf16", *SHORT, "init.method=lora_ga", "model.dtype=bf16", "init.layer_groups=2")
        launch(root / "resumed", *SHORT, "checkpoint.steps=4", killed_in_step=6)
        launch(root / "resumed", *SHORT, "checkpoint.steps=4")
        assert "going on from" in (root / "resumed.log").read_text(), "it was killed in time"
        with Hosts(root / "hosts") as hosts:
            job = jobs.start(hosts, "pdsh", 2, 2, root / "hosts_2x2", "deepspeed.shard_group=node", "train.max_steps=6")
            assert job.wait(300) == [0], job.output()[-3000:]
        for name in ("demo", "lora_ga_bf16", "resumed", "hosts_2x2"):
            found[name] = outcome(root / name)
            print(name, json.dumps(found[name]))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
