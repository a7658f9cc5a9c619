"""The memory of a rank: what does not fit is refused before a weight is read, and what fits recomputes the least."""

from __future__ import annotations

import json

import pytest

from tests.ranks import run_ranks
from tests.runs import metrics, refused, settings, train_each


def test_a_limit_that_is_too_small_is_refused_before_loading_and_says_what_to_change(model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run", model__memory_gb=0.0002)
    messages = run_ranks(2, refused, raw)
    assert messages[0] == messages[1]
    assert "model.memory_gb = 0.0002, 0.00 GB on rank 0: the run does not fit." in messages[0]
    assert "gradient needs" in messages[0]
    assert "Or raise model.memory_gb, if more is there." in messages[0]


@pytest.mark.full
def test_as_few_blocks_are_recomputed_as_fit_and_the_losses_do_not_depend_on_them(model_folder, tmp_path):
    folder, found = model_folder("llama"), {}
    cases = [("none", "auto"), ("auto", "auto"), ("auto", 0.00083), ("all", "auto"), (2, "auto")]
    outs = [tmp_path / f"{recompute}-{limit}" for recompute, limit in cases]
    raws = [
        settings(folder, out, model__recompute=recompute, model__memory_gb=limit, train__max_steps=3)
        for out, (recompute, limit) in zip(outs, cases, strict=True)
    ]
    run_ranks(2, train_each, raws)
    for out, (recompute, limit) in zip(outs, cases, strict=True):
        counts = json.loads((out / "summary.json").read_text())["recomputed_blocks"]
        found[recompute, limit] = counts, [line["loss"] for line in metrics(out) if "loss" in line]
    assert found["none", "auto"][0] == found["auto", "auto"][0] == {"gradient": 0, "step": 0}
    assert found["all", "auto"][0] == {"gradient": 3, "step": 3}
    assert found[2, "auto"][0] == {"gradient": 2, "step": 2}
    some = found["auto", 0.00083][0]
    assert any(0 < count < 3 for count in some.values()), some
    losses = [pytest.approx(losses, abs=1e-6, rel=0) for _, losses in found.values()]
    assert all(found["none", "auto"][1] == of_another for of_another in losses)
