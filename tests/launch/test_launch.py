"""The command line, as users type it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs import CONFIG as DEMO
from tests.jobs import SHORT
from tests.ranks import run_script
from tests.runs import metrics

BIN = Path(sys.executable).parent


def call(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    # A process group of its own: a launcher that hangs is ended with its children by the time-out.
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [str(part) for part in command],
        env={**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_print_config_is_a_config(tmp_path):
    printed = call(sys.executable, "launch/train.py", "--config", DEMO, "--print_config", "lora.r=4", "optim.lr=1e-3")
    assert printed.returncode == 0, printed.stderr
    resolved = yaml.safe_load(printed.stdout)
    assert resolved["lora"]["r"] == 4
    assert resolved["optim"]["lr"] == 1e-3
    assert resolved["optim"]["eps"] == 1e-8, "defaults are shown"
    (tmp_path / "resolved.yaml").write_text(printed.stdout)
    again = call(sys.executable, "launch/train.py", "--config", tmp_path / "resolved.yaml", "--print_config")
    assert again.stdout == printed.stdout


def test_bad_config_reports_everything_and_exits_2():
    bad = [
        "lora.r=0",
        "optim.lrr=1",
        "train.epochs=1",
        "train.max_steps=9",
        "data.eval=nowhere.jsonl",
        "model.dtype=fp16",
    ]
    result = call(sys.executable, "launch/train.py", "--config", DEMO, *bad)
    assert result.returncode == 2
    for expected in ("5 problems", "lora.r = 0", "Did you mean lr?", "exactly one", "nowhere.jsonl", "'fp16'"):
        assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_used_folder_exits_1_without_a_traceback(tmp_path):
    (tmp_path / "used").write_text("x")
    (tmp_path / "said").mkdir()
    code, _, stderr = run_script(tmp_path / "said", "launch/train.py", "--config", DEMO, f"output_dir={tmp_path}")
    assert code == 1
    assert "exists and is not empty" in stderr
    assert "Traceback" not in stderr


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]


@pytest.mark.full
def test_deepspeed_launcher_equals_a_single_process(tmp_path):
    """Also: no compiler runs on a CPU, whatever the machine's extension cache holds."""
    extensions = tmp_path / "extensions"
    train = ["launch/train.py", "--config", DEMO, *SHORT]
    two = call(
        *(BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29731", *train, f"output_dir={tmp_path / 'two'}"),
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    assert two.returncode == 0, two.stdout[-3000:] + two.stderr[-3000:]
    assert "2 ranks on 1 host, cpu, launched by deepspeed" in two.stdout
    assert str(tmp_path / "two" / "adapter") in two.stdout
    assert not extensions.exists() or not any(extensions.rglob("*.so"))
    code, stdout, stderr = run_script(tmp_path, *train, f"output_dir={tmp_path / 'one'}")
    assert code == 0, stderr[-3000:]
    assert "1 ranks on 1 host, cpu, launched by single process" in stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.full
def test_torchrun(tmp_path):
    result = call(
        *(BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "29732"),
        *("launch/train.py", "--config", DEMO, *SHORT, f"output_dir={tmp_path / 'run'}"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 ranks on 1 host, cpu, launched by torchrun" in result.stdout
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.full
def test_a_hostfile_that_is_not_there_ends_the_job(tmp_path):
    result = call(
        *(BIN / "deepspeed", "--hostfile", "gone", "--num_gpus", "1", "--master_port", "29734", "launch/train.py"),
        *("--config", DEMO, *SHORT, f"output_dir={tmp_path / 'run'}"),
    )
    assert result.returncode != 0
    assert "gone: no such file; deepspeed would go on with this host alone. Correct the path, or" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_refused_target_ends_the_job(tmp_path):
    """The job ends, non-zero, and the message is told once by each rank that failed."""
    result = call(
        *(BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29733", "launch/train.py", "--config", DEMO),
        *(*SHORT, "lora.target_modules=[q_porj]", f"output_dir={tmp_path / 'run'}"),
    )
    assert result.returncode != 0
    assert "'q_porj' matches no layer. Did you mean q_proj" in result.stderr
