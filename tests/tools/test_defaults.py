"""The defaults' study: what it runs next, and what its tables say, on made-up losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lora_one_dist.config.optim import OptimConfig
from tests.ranks import run_ranks
from tests.train.test_optim import train_pairs
from tools.study import defaults, defaults_report, forms, hessian, train_form

CELL = defaults.DEMO
PLAIN, OTHER = defaults.Variant("none", "none"), defaults.Variant("rescaled", "rescaled")


@pytest.fixture
def runs(tmp_path, monkeypatch) -> defaults.Runs:
    (tmp_path / "defaults").mkdir()
    monkeypatch.setattr(defaults.base, "SIZES", {})  # the demo's cell alone
    defaults.write_configs(tmp_path)
    return defaults.Runs(tmp_path, at_once=1)


def finish(runs: defaults.Runs, points, factor: float = 1.0) -> None:
    """Losses with a least at a rate of 1e-2, a little more for each seed."""
    for point in points:
        rate, seed = point.labels["optim.lr"], point.labels["train.seed"]
        other = point.labels["variant"] != "none"
        loss = (
            (2 + abs(math.log10(rate) + 2)) * (factor if other else 1.0) * (1 + seed / 100) * (1 + other * seed / 1e4)
        )
        point.folder.mkdir(parents=True, exist_ok=True)
        (point.folder / "config.yaml").write_text(point.config.to_yaml())
        summary = {"after": {"eval_loss": loss}, "phases": [{"seconds": 1.0}]}
        (point.folder / "summary.json").write_text(json.dumps(summary))


def test_rates_go_on_at_an_edge_and_the_best_goes_on_to_fresh_seeds(runs, tmp_path):
    stage = defaults.Stage("seeds", (CELL,), (PLAIN, OTHER), fresh=2)
    wanted = runs.wanted(stage)
    assert [p.labels["optim.lr"] for p in wanted] == [1e-3, 3e-3, 1e-2] * 2
    assert wanted[0].arguments[:2] == ("--form", "none")
    finish(runs, wanted, 0.9)
    wanted = runs.wanted(stage)
    assert [(p.labels["variant"], p.labels["optim.lr"]) for p in wanted] == [("none", 3e-2), ("rescaled", 3e-2)]
    runs.failed[wanted[0].name] = "it diverged"
    finish(runs, wanted[1:], 0.9)
    wanted = runs.wanted(stage)
    assert sorted((p.labels["optim.lr"], p.labels["train.seed"]) for p in wanted) == [
        (1e-2, 1),
        (1e-2, 1),
        (1e-2, 2),
        (1e-2, 2),
    ]
    finish(runs, wanted, 0.9)
    assert runs.wanted(stage) == []

    rows = defaults_report.run_rows(runs, stage)
    assert [row["failed"] for row in rows if "failed" in row] == ["it diverged"]
    assert len(rows) == 12
    found = defaults_report.against_baseline(runs, stage, OTHER)
    mean, error = found.mean_and_error([CELL])
    assert mean == pytest.approx(math.log(0.9) + 1.5e-4, rel=1e-3), "of seeds 1 and 2, not of 0"
    assert error == pytest.approx(0.5e-4, rel=1e-2)
    text = defaults_report.stage_text(runs, stage, rows)
    assert "wins" in text
    assert "Failed: demo, none, 0.03" in text
    assert found.mean_and_error([CELL, "another"]) is None


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([[-0.02, -0.03, -0.02], [-0.01, -0.02, -0.02]], "wins"),
        ([[-0.08, -0.09, -0.08], [0.02, 0.03, 0.02]], "tie, worse on 1"),
        ([[0.02, 0.03, 0.02], [0.01, 0.02, 0.02]], "loses"),
        ([[-0.02, 0.03, 0.01], [0.01, -0.02, 0.02]], "tie"),
    ],
)
def test_verdicts_follow_the_plan(cells, expected):
    found = defaults_report.Against({str(i): dict(enumerate(ratios)) for i, ratios in enumerate(cells)})
    assert defaults_report.verdict(found, list(found.ratios)) == expected


def by_form(name: str, config: OptimConfig, trace: str):
    """Runs on a rank."""
    train_form.use(forms.FORMS[name], Path(trace))
    return train_pairs(config, 1)


@pytest.mark.parametrize(
    ("name", "setting"), [("none", "none"), ("paper", "riemannian"), ("rescaled, fading", "rescaled")]
)
def test_a_form_of_the_package_s_own_trains_as_the_package(name, setting, tmp_path):
    config = OptimConfig(lr=1e-2, weight_decay=0.1, lr_ratio_b=4.0, preconditioner=setting)
    ((form, _),) = run_ranks(1, by_form, name, config, str(tmp_path / "trace"))
    ((package, _),) = run_ranks(1, train_pairs, config, 1)
    for i, (ours, theirs) in enumerate(zip(form, package, strict=True)):
        if i != 1:  # near-singular: moments of 1e10 apart
            for one, other in zip(ours, theirs, strict=True):
                assert float((one - other).norm() / other.norm()) <= 1e-5
    assert json.loads((tmp_path / "trace").read_text())["step"] == 1


def test_predicted_rates_are_those_of_the_eigenvalues():
    found = [
        {"task": "gap", "method": "LoRA", "largest": 2.0, "smallest": -1.0},
        {"task": "gap", "method": "LoRA-One", "largest": 8.0, "smallest": -1.0},
    ]
    rows = hessian.predictions(found, {("gap", "LoRA"): 4e-3, ("gap", "LoRA-One"): 3e-3})
    assert [(row["predicted rate"], row["best"]) for row in rows] == [("4.0e-03", 4e-3), ("1.0e-03", 3e-3)]
