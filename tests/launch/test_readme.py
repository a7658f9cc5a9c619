"""The commands of the README's path from one's own chats to an adapter, as they are printed there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_from_chats_to_an_adapter(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.search(r"## Train on your own chats.*?```\n(.*?)```", readme, re.S)[1].splitlines()
    assert [shlex.split(line)[1].removeprefix("tools/") for line in commands] == [
        "inspect_data.py",
        "plan.py",
        "launch/train.py",
        "report.py",
        "export_adapter.py",
    ]
    for name in ("launch", "tools", "ds_configs", "lora_one_dist"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    printed = []
    for line in commands:
        command = line.replace("deepspeed ", f"deepspeed --num_gpus 2 --master_port {free_port()} ")
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    assert "[[" in printed[0], "what is learnt is marked"
    assert "every phase fits" in printed[1]
    before, after = map(float, re.search(r"held-out loss\s+([\d.]+)\s+([\d.]+)", printed[2]).groups())
    assert before > 3
    assert after < 0.1
    assert (tmp_path / "runs/chat_report/index.html").is_file()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "launch/demo/model")
    assert PeftModel.from_pretrained(base, tmp_path / "runs/chat_adapter").peft_config["default"].r == 8
