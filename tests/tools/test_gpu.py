"""The battery for a new machine, on a CPU: what it can show passes, what it cannot is named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.ranks import free_port

QUICK = "environment,products,svd,preconditioner,loss,branch,gradient,groups,syncs"


def battery(out, *arguments, **env):
    command = [sys.executable, "tools/gpu/battery.py", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env or None)


def rows_of(out):
    return {row["row"]: row for row in json.loads(out.read_text())["rows"]}


def test_rows_of_the_cpu_pass_and_the_others_say_why_not(tmp_path):
    process = battery(tmp_path / "gpu.json", "--rows", QUICK)
    said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    found = rows_of(tmp_path / "gpu.json")
    assert list(found) == QUICK.split(",")
    left_out = {name: row["figure"] for name, row in found.items() if row["result"] == "LEFT OUT"}
    assert left_out.keys() == {"groups", "syncs"}
    assert left_out["syncs"] == "needs a GPU"
    assert "start it with a launcher" in left_out["groups"]
    assert "7 PASS, 0 FAIL, 2 LEFT OUT" in said
    about = json.loads((tmp_path / "gpu.json").read_text())
    assert {"hardware", "versions", "commit", "command"} <= about.keys()


def test_a_row_that_fails_is_named_and_the_next_has_its_turn(tmp_path, monkeypatch):
    from tools.gpu import battery as module
    from tools.gpu.row import Figure

    def broken():
        raise OSError("no such device")

    rows = {"svd": module.Row(1, broken), "loss": module.Row(1, lambda: Figure(False, "9", "1"))}
    monkeypatch.setattr(module, "ROWS", {**rows, "branch": module.Row(2, lambda: Figure(True, "1", "1"))})
    monkeypatch.setattr(sys, "argv", ["tools/gpu/battery.py", "--out", str(tmp_path / "gpu.json")])
    assert module.main() == 1
    found = rows_of(tmp_path / "gpu.json")
    assert [row["result"] for row in found.values()] == ["FAIL", "FAIL", "PASS"]
    assert found["svd"]["figure"] == "OSError: no such device"
    assert "broken" in found["svd"]["traceback"]


def test_groups_of_several_ranks(tmp_path):
    import os

    port = str(free_port())
    started = []
    for rank in range(4):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_PORT": port}
        env = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1"}
        started.append(battery(tmp_path / "gpu.json", "--rows", "groups", **env))
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    assert "4 ranks on 1 hosts: all-reduce" in said[0][0]
    assert rows_of(tmp_path / "gpu.json")["groups"]["result"] == "PASS"


@pytest.mark.full
def test_every_row(tmp_path):
    process = battery(tmp_path / "gpu.json")
    said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    results = {name: row["result"] for name, row in rows_of(tmp_path / "gpu.json").items()}
    assert {name for name, result in results.items() if result != "PASS"} == {"groups", "syncs"}
