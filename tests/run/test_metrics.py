"""What a run tells people and files: lines, JSON, TensorBoard, the picture, the table."""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_one_dist.cluster import comm
from lora_one_dist.run import metrics
from lora_one_dist.run.metrics import MIB, Phases, RunFolder, final_table, init_summary, plot_report
from tests import models


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A record that keeps what it says."""
    record = RunFolder(tmp_path / "silent", writes=False)
    said: list[str] = []
    monkeypatch.setattr(record, "say", said.append)
    return record, said


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress_is_a_line_every_five_seconds_and_one_at_the_end(clock, lines):
    record, said = lines
    for done in range(1, 11):
        record.progress("svd", done, 10)
        clock.now += 2.0
    # Units of 2 s: 5 s have passed at the 4th, 7th and 10th call.
    assert said == ["svd 4/10, 12 s left", "svd 7/10, 6 s left", "svd 10/10"]


def test_quick_work_is_one_line(clock, lines):
    record, said = lines
    for done in range(1, 101):
        record.progress("svd", done, 100)
        clock.now += 0.01
    record.progress("one", 1, 1)
    assert said == ["svd 100/100", "one 1/1"]


def test_time_left_follows_the_speed_since_the_first_unit(clock, lines):
    record, said = lines
    clock.now += 500  # long ago another thing ended
    record.progress("gradient", 1, 5)
    clock.now += 30
    record.progress("gradient", 2, 5)
    clock.now += 10
    record.progress("gradient", 3, 5)
    assert said == ["gradient 2/5, 90 s left", "gradient 3/5, 40 s left"]


def test_same_label_again_starts_a_new_clock(clock, lines):
    record, said = lines
    for _ in range(2):
        record.progress("gradient", 1, 3)
        clock.now += 6
        record.progress("gradient", 2, 3)
        clock.now += 100
    assert said == ["gradient 2/3, 6 s left"] * 2


# The run folder -------------------------------------------------------------------------------------------------------


def test_log_is_a_json_line_at_once_and_numbers_in_tensorboard(tmp_path, capsys):
    root = tmp_path / "a" / "run"
    record = RunFolder(root, writes=True)
    record.log(1, {"loss": 2.5, "slowest_rank": 3})
    assert json.loads((root / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5, "slowest_rank": 3}
    record.log(2, {"loss": 2.25, "note": "no number"})
    record.write_json("run.json", {"é": [1, None]})
    record.say("a line")
    record.close()
    logged = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert logged[1:] == [{"step": 2, "loss": 2.25, "note": "no number"}]
    assert json.loads((root / "run.json").read_text()) == {"é": [1, None]}
    assert capsys.readouterr().out == "a line\n"
    events = EventAccumulator(str(root / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "slowest_rank"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.25)]


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    record = RunFolder(tmp_path / "run", writes=False)
    record.log(1, {"loss": 2.5})
    record.write_json("run.json", {})
    record.say("a line")
    record.progress("svd", 1, 1)
    record.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# Phases ---------------------------------------------------------------------------------------------------------------


def test_phase_entered_again_adds_its_seconds_and_keeps_the_larger_peak(clock, monkeypatch):
    peaks = iter([9, 5, 7])
    monkeypatch.setattr(metrics, "peak_bytes", lambda: next(peaks))
    phases = Phases()
    for seconds, name in ((2, "svd"), (10, "gradient"), (3, "svd")):
        with phases(name):
            clock.now += seconds
        clock.now += 100  # between phases
    assert phases.seconds == {"svd": 5, "gradient": 10}
    assert phases.peak_bytes == {"svd": 9, "gradient": 5}


def test_phase_that_fails_is_counted(clock):
    phases = Phases()

    def fail():
        with phases("svd"):
            clock.now += 4
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert phases.seconds == {"svd": 4}


def test_phases_over_ranks_are_the_slowest_and_the_largest(monkeypatch):
    others = [
        ({"load": 1.0, "svd": 9.0}, {"load": 50, "svd": 10}),
        ({"svd": 2.0, "load": 3.0}, {"svd": 30, "load": 20}),
    ]
    monkeypatch.setattr(comm, "all_gather_object", lambda mine: [mine, *others])
    phases = Phases()
    phases.seconds, phases.peak_bytes = {"load": 2.0, "svd": 4.0}, {"load": 40, "svd": 20}
    assert phases.over_ranks() == [
        {"phase": "load", "seconds": 3.0, "peak_bytes": 50},
        {"phase": "svd", "seconds": 9.0, "peak_bytes": 30},
    ]


def test_peak_on_a_cpu_is_of_the_phase_and_sees_what_was_freed_within_it(monkeypatch):
    monkeypatch.setattr(metrics.torch.cuda, "is_available", lambda: False)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system has no peak that can be reset")
    phases = Phases()
    for name, size in (("large", 64 * MIB), ("small", 4096)):
        # Straight from the system: malloc may answer from a freed hole that is still resident, and the peak stays.
        with phases(name), mmap.mmap(-1, size) as held:
            held[::4096] = b"1" * (size // 4096)  # touch every page
    assert phases.peak_bytes["large"] - phases.peak_bytes["small"] > 32 * MIB


# The report -----------------------------------------------------------------------------------------------------------


def row(name, coverage, error=1e-6, overlap=None):
    return {"name": name, "coverage": coverage, "certified_error": error, "half_overlap": overlap}


ROWS = [
    row("layers.0.q_proj", {1: 0.5, 2: 0.8, 4: 0.9, 8: 1.0}, overlap=0.25),
    row("layers.0.k_proj", {1: 0.3, 2: 0.4}, error=2e-4, overlap=0.75),
    row("layers.1.q_proj", {1: 0.1, 2: 0.2, 4: 0.3}),
]


def test_summary_tells_coverage_certificate_and_overlap():
    assert init_summary(ROWS, tokens=100, r=2) == [
        "rank 2 covers 20% to 80% of a layer's energy, 47% on average",
        "largest certified error of a top space 2.0e-04 (layers.0.k_proj)",
        "top-2 spaces of the batch's halves overlap by 50% on average (100 %: more samples change nothing)",
    ]


def test_summary_leaves_out_what_was_not_measured():
    # A rank between those of the report, no halves; methods without an SVD have no rows to tell of.
    assert init_summary([ROWS[2]], tokens=100, r=3) == [
        "largest certified error of a top space 1.0e-06 (layers.1.q_proj)"
    ]
    assert init_summary([{"name": "q", "m": 4, "n": 4}], tokens=1, r=8) == []


@pytest.mark.parametrize(("tokens", "warned"), [(7, True), (8, False), (9, False)])
def test_fewer_tokens_than_the_rank_is_warned_of(tokens, warned):
    said = init_summary(ROWS, tokens, r=8)
    assert any(line.startswith(f"warning: the init batch has {tokens} target tokens") for line in said) == warned
    if warned:
        assert "fewer than lora.r = 8" in said[-1]
        assert said[-1].endswith("Raise init.num_samples.")


def test_picture_shows_means_over_layers_at_ranks_that_all_have(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot_report([*ROWS, {"name": "layers.1.odd"}], tmp_path / "report.png", r=4)
    monkeypatch.undo()
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(plt.imread(tmp_path / "report.png").reshape(-1, 4)) > 500_000, "large enough to read"
    by_rank, by_depth = figures[0].axes
    drawn = {line.get_label(): [list(map(float, axis)) for axis in line.get_data()] for line in by_rank.lines}
    assert drawn["q_proj"] == [[1, 2, 4], [pytest.approx(0.3), pytest.approx(0.5), pytest.approx(0.6)]]
    assert drawn["k_proj"] == [[1, 2], [0.3, 0.4]]
    assert drawn["lora.r = 4"][0] == [4, 4]
    along = {line.get_label(): [list(map(float, axis)) for axis in line.get_data()] for line in by_depth.lines}
    assert along == {"q_proj": [[0, 1], [0.9, 0.3]]}, "k_proj has no rank 4"
    plt.close(figures[0])


def test_no_picture_without_an_svd(tmp_path):
    plot_report([{"name": "layers.0.q_proj", "m": 4, "n": 4}], tmp_path / "report.png", r=4)
    assert list(tmp_path.iterdir()) == []


def test_final_table_holds_both_losses_and_every_phase():
    phases = [
        {"phase": "svd", "seconds": 12.34, "peak_bytes": 1536 * MIB},
        {"phase": "train", "seconds": 0, "peak_bytes": 0},
    ]
    table = final_table("a title", [("loss", 2.0, 1.23456), ("exact match", None, 0.5)], phases)
    rows = [line.split() for line in table.splitlines()]
    assert rows[:4] == [[], ["a", "title"], ["before", "after"], ["loss", "2.0000", "1.2346"]]
    assert rows[4:6] == [["exact", "match", "-", "0.5000"], []]
    assert rows[6][:4] == ["phase", "seconds", "peak", "MiB"]
    assert rows[7:] == [["svd", "12.3", "1536"], ["train", "0.0", "0"]]
    columns = table.splitlines()
    assert columns[2].index("after") + 5 == columns[3].index("1.2346") + 6 == len(columns[4]), "in columns"
    assert "nan" in final_table("", [("loss", math.nan, 1.0)], [])


def test_a_head_whose_loss_is_not_taken_in_pieces_is_told(tmp_path, capsys):
    record, net = metrics.RunFolder(tmp_path, writes=True), models.llama()
    record.say_how_loss_is_taken(net.requires_grad_(False))
    assert capsys.readouterr().out == ""
    net.lm_head.weight.requires_grad_()
    record.say_how_loss_is_taken(net)
    assert capsys.readouterr().out == (
        "the loss takes the logits of all rows with a target at once: the output head is not a plain frozen layer\n"
    )
    record.close()
