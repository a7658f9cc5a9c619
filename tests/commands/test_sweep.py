"""tools/sweep.py with a stand-in for launch/train.py: what it makes of a grid, resumes, records and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from lora_one_dist.commands import sweep, sweep_report
from tests import tool
from tests.jobs import CONFIG as DEMO

ROOT = Path(__file__).resolve().parents[2]
# Trains nothing: the loss is a function of the config, gamma 13 fails, and a seed of 99 takes a minute.
STAND_IN = f"""
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lora_one_dist.config.reading import load_config
config = load_config(sys.argv[2], sys.argv[3:])
root = Path(config.output_dir)
root.mkdir(exist_ok=True)
with (root / "started").open("a") as file:
    file.write(f"{{os.getpid()}} {{os.environ.get('OMP_NUM_THREADS')}}\\n")
if config.init.gamma == 13:
    sys.exit("the thirteenth is refused")
if config.train.seed == 99:
    time.sleep(60)
loss = abs(config.optim.lr - 3e-3) * 100 + config.train.seed / 10
summary = {{"before": {{"eval_loss": 9.0}}, "after": {{"eval_loss": loss}}, "phases": [{{"seconds": 1.5}}]}}
(root / "config.yaml").write_text(config.to_yaml())
(root / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


def starts(point: sweep.Point) -> list[str]:
    return (point.folder / "started").read_text().splitlines()


def test_values_are_split_outside_brackets_and_quotes():
    assert sweep.split_values("1e-3,2e-3") == ["1e-3", "2e-3"]
    assert sweep.split_values("[0.9,0.99],[0.9,0.999]") == ["[0.9,0.99]", "[0.9,0.999]"]
    assert sweep.split_values("'a,b',{x: [1,2]}") == ["'a,b'", "{x: [1,2]}"]
    assert sweep.split_values("q_proj") == ["q_proj"]


def test_grid_is_the_product_and_joins_explicit_points(tmp_path):
    grid = sweep.expand(["optim.lr=1e-3,2e-3", "lora.r=4", "train.seed=0,1"])
    assert [point["optim.lr"] + point["train.seed"] for point in grid] == ["1e-30", "1e-31", "2e-30", "2e-31"]
    assert all(point["lora.r"] == "4" for point in grid)
    path = tmp_path / "points.yaml"
    path.write_text(yaml.safe_dump([{"init.method": "lora", "optim.betas": [0.9, 0.99]}, {"init.method": "pissa"}]))
    joined = sweep.expand(["train.seed=0,1"], sweep.read_points(path))
    assert [(point["init.method"], point["train.seed"]) for point in joined] == [
        *(("lora", "0"), ("lora", "1")),
        *(("pissa", "0"), ("pissa", "1")),
    ]
    assert joined[0]["optim.betas"] == "[0.9, 0.99]"
    with pytest.raises(sweep.SweepError, match=r"init.method: given by --points and on the command line"):
        sweep.expand(["init.method=lora"], sweep.read_points(path))


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", "[{}]", "a: ["])
def test_bad_points_file_is_refused(tmp_path, text):
    (tmp_path / "points.yaml").write_text(text)
    with pytest.raises(sweep.SweepError, match=r"--points .*points.yaml"):
        sweep.read_points(tmp_path / "points.yaml")


def test_names_are_readable_and_tell_any_two_configs_apart(tmp_path):
    def points(*settings: str) -> list[sweep.Point]:
        return sweep.make_points(DEMO, tmp_path, sweep.expand(settings))

    grid = points("optim.lr=1e-3,2e-3", "init.method=lora_one,lora_ga")
    assert grid[0].name.startswith("lr-0.001_method-lora_one_")
    assert grid[0].labels == {"optim.lr": 1e-3, "init.method": "lora_one"}
    again = points("optim.lr=1e-3,2e-3", "init.method=lora_one,lora_ga")
    other = points("optim.lr=1e-3,2e-3", "init.method=lora_one,lora_ga", "lora.r=4")
    assert [point.name for point in again] == [point.name for point in grid]
    assert len({point.name for point in [*grid, *other]}) == 8
    with pytest.raises(sweep.SweepError, match="the same run more than once"):
        points("optim.lr=1e-3,0.001")


def test_every_problem_of_every_point_comes_before_the_first_run(tmp_path):
    done = tool.run(
        "sweep",
        *("--config", DEMO, "--out", tmp_path / "out", "optim.lr=1e-3,-1", "init.method=lora_one,lora_two", "lora.q=1"),
        check=False,
    )
    assert done.returncode == sweep.BAD_CONFIG
    for expected in ("nothing was started", "optim.lr = -1", "lora_two", "lora.q = 1", "optim.lr=-1, init.method="):
        assert expected in done.stderr
    assert not (tmp_path / "out").exists()


def test_runs_each_point_once_and_records_what_failed(tmp_path, script):
    said: list[str] = []
    settings = ["optim.lr=1e-3,3e-3", "train.seed=0,1", "init.gamma=13,64"]
    points = sweep.make_points(DEMO, tmp_path / "out", sweep.expand(settings), script)
    failed = sweep.run(points, at_once=2, say=said.append)
    assert said[0] == "8 runs, 0 done before, 8 to do"
    assert sorted(failed) == sorted(point.name for point in points if point.config.init.gamma == 13)
    assert set(failed.values()) == {"the thirteenth is refused"}
    assert starts(points[0])[0].endswith(" 1"), "one thread a rank"

    assert sweep.run(points, say=said.append).keys() == failed.keys()
    assert "8 runs, 4 done before, 4 to do" in said
    assert [len(starts(point)) for point in points] == [2, 1] * 4, "what failed is tried again, what is done is not"

    text = sweep_report.write(points, failed, tmp_path / "out", "eval_loss", "optim.lr")
    rows = [json.loads(line) for line in (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["failed", "done"] * 4
    assert rows[0]["log"] == "the thirteenth is refused"
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    summed = next(line for line in text.splitlines() if line.startswith("| 64") and line.count("|") == 6)
    assert [cell.strip() for cell in summed.strip("|").split("|")] == ["64", "0.003", "0.05", "0.07071", "2"]
    assert "the thirteenth is refused" in text


def test_a_run_that_has_another_config_now_is_not_done(tmp_path, script):
    (point,) = sweep.make_points(DEMO, tmp_path, sweep.expand(["lora.r=4"]), script)
    assert sweep.run([point], say=lambda line: None) == {}
    assert point.summary()["after"]["eval_loss"] == pytest.approx(0.2)
    config = point.folder / "config.yaml"
    config.write_text(config.read_text().replace("r: 4", "r: 5"))
    assert point.summary() is None
    config.unlink()
    assert point.summary() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_runs_and_nothing_else(tmp_path, script, number):
    points = sweep.make_points(DEMO, tmp_path, sweep.expand(["train.seed=99", "optim.lr=1e-3,2e-3,3e-3"]), script)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def interrupt() -> None:
        while not all((point.folder / "started").exists() and starts(point) for point in points[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    # A suite that runs in the background may have been told to ignore SIGINT.
    on_interrupt, on_term = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), sweep.sigterm_interrupts():
        sweep.run(points, at_once=2, say=lambda line: None)
    signal.signal(signal.SIGINT, on_interrupt)
    assert signal.getsignal(signal.SIGTERM) is on_term
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert not points[2].folder.exists(), "two at once"
    for point in points[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(starts(point)[0].split()[0]), 0)


def test_one_run_for_each_free_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0, 3\\n1, 40000\\n2, 0\\n3, 0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweep.free_slots(1, 1) == [{"CUDA_VISIBLE_DEVICES": index} for index in "023"]
    assert sweep.free_slots(1, 2) == [{"CUDA_VISIBLE_DEVICES": "0,2"}], "no run on half of its GPUs"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert sweep.free_slots(1, 1) == [{"CUDA_VISIBLE_DEVICES": "2"}]
    with pytest.raises(sweep.SweepError, match="1 of the GPUs 1, 2 are free, --ranks 2"):
        sweep.free_slots(1, 2)
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert sweep.free_slots(2, 1) == [{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}] * 2


def test_best_of_each_group_is_chosen_by_the_mean_over_seeds():
    losses = {("a", 1.0): (5.0, 1.0), ("a", 2.0): (2.0, 2.0), ("b", 1.0): (7.0,)}
    found = [
        {"status": "done", "labels": {"init.method": m, "optim.lr": lr, "train.seed": i}, "eval_loss": loss}
        for (m, lr), values in losses.items()
        for i, loss in enumerate(values)
    ]
    found.append({"status": "missing", "labels": {"init.method": "c", "optim.lr": 1.0, "train.seed": 0}})
    chosen = sweep_report.best(sweep_report.cells(found, "eval_loss", "optim.lr"), "eval_loss")
    assert [(dict(cell.group)["init.method"], cell.x, cell.values) for cell in chosen] == [
        ("a", 2.0, (2.0, 2.0)),
        ("b", 1.0, (7.0,)),
    ]
    assert sweep_report.mean_and_spread((1.0, 3.0)) == (2.0, pytest.approx(2**0.5))
    assert sweep_report.mean_and_spread((7.0,)) == (7.0, None)
    exact = [{**row, "exact_match": -row["eval_loss"]} for row in found if "eval_loss" in row]
    highest = sweep_report.best(sweep_report.cells(exact, "exact_match", "optim.lr"), "exact_match")
    assert [cell.x for cell in highest] == [2.0, 1.0], "more is better"


@pytest.mark.full
def test_real_runs_go_on_where_they_were_cut_off(tmp_path):
    settings = ["optim.lr=1e-3,5e-3", "train.max_steps=2", "train.eval_steps=0", "train.exact_match_samples=0"]
    settings += ["train.exact_match_pattern=null", "train.exact_match_max_new_tokens=64", "data.max_eval_samples=32"]
    settings += ["optim.warmup_steps=1", "checkpoint.keep_best=false"]
    command = ["--config", DEMO, "--out", tmp_path, "--at_once", 2, *settings]
    first = tool.run("sweep", *command)
    assert "2 runs, 0 done before, 2 to do" in first.stdout
    assert first.stdout.count("| done") == 2
    again = tool.run("sweep", *command)
    assert "2 runs, 2 done before, 0 to do" in again.stdout
    assert again.stdout.split("\n\n")[1:] == first.stdout.split("\n\n")[1:]
