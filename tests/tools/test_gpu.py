"""The battery for a new machine, on a CPU: what it can show passes, what it cannot is named."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest

from tests.ranks import run_ranks

QUICK = "environment,products,svd,preconditioner,loss,branch,gradient,groups,syncs"


def battery(out, *arguments):
    command = [sys.executable, "tools/gpu/battery.py", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_of(out):
    return {row["row"]: row for row in json.loads(out.read_text())["rows"]}


def test_rows_of_the_cpu_pass_and_the_others_say_why_not(tmp_path):
    done = battery(tmp_path / "gpu.json", "--rows", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows_of(tmp_path / "gpu.json")
    assert list(found) == QUICK.split(",")
    left_out = {name: row["figure"] for name, row in found.items() if row["result"] == "LEFT OUT"}
    assert left_out.keys() == {"groups", "syncs"}
    assert left_out["syncs"] == "needs a GPU"
    assert "start it with a launcher" in left_out["groups"]
    assert "7 PASS, 0 FAIL, 2 LEFT OUT" in done.stdout
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


def on_a_rank(*arguments):
    """Runs on a rank: the battery's exit code, and what it printed."""
    from tools.gpu import battery as module

    sys.argv = ["tools/gpu/battery.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = module.main()
    return code, printed.getvalue()


def test_groups_of_several_ranks(tmp_path):
    said = run_ranks(4, on_a_rank, "--out", str(tmp_path / "gpu.json"), "--rows", "groups", init=False)
    assert [code for code, _ in said] == [0] * 4, said
    assert "4 ranks on 1 hosts: all-reduce" in said[0][1]
    assert rows_of(tmp_path / "gpu.json")["groups"]["result"] == "PASS"


@pytest.mark.full
def test_every_row(tmp_path):
    done = battery(tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {name: row["result"] for name, row in rows_of(tmp_path / "gpu.json").items()}
    assert {name for name, result in results.items() if result != "PASS"} == {"groups", "syncs"}
