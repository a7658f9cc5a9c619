"""How many samples, which rank: against float64 gradients of one process, and as a user calls it."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
import yaml

from lora_one_dist.commands.coverage import command, tables
from lora_one_dist.config.reading import parse_config
from tests import models, reference
from tests.initialise.test_gradient import load_base
from tests.ranks import run_ranks
from tests.runs import settings

COUNTS, MANY, R = [1, 3, 4, 8], 11, 4
# Of a space whose gap is open; the SVDs' fp32 error over the gap.
OVERLAP_TOLERANCE, OPEN_GAP = 1e-3, 2e-2


def measured(folder, raw):
    """Runs on a rank: the report's rows."""
    from lora_one_dist.commands.coverage.measure import measure

    base, targets = load_base(folder, "zero3", r=R)
    return measure(base, targets, parse_config(raw), models.samples(MANY), COUNTS, 0, lambda *_: None)


@pytest.fixture(scope="module")
def truth():
    """Float64: gradients of the first samples, by their number and target."""
    model = models.llama().double()
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"]
    samples = models.samples(MANY)
    return {count: reference.full_gradient(model, samples[:count], names) for count in [*COUNTS, MANY]}


@pytest.mark.parametrize(("ranks", "init"), [(1, {}), (2, {"buffer": "host", "layer_groups": 3}), (3, {})], ids=str)
def test_rows_equal_those_of_float64_gradients(ranks, init, model_folder, tmp_path, truth):
    raw = settings(model_folder("llama"), tmp_path / "out") | {"init": {**init, "micro_batch_size": 2}}
    found = run_ranks(ranks, measured, model_folder("llama"), raw)
    assert all(rows == found[0] for rows in found)
    assert [row["name"] for row in found[0]] == list(truth[MANY])
    open_gaps = 0
    for row in found[0]:
        many, one = truth[MANY][row["name"]], 1 / (row["m"] * row["n"])
        U, S, Vh = torch.linalg.svd(many, full_matrices=False)
        for rank, share in row["coverage"].items():
            assert share == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), rel=1e-5)
        for count in COUNTS:
            few, shown = truth[count][row["name"]], row["similarity"][count]
            ratio = (few / many).abs()
            # In fp32 an element may fall on the other side of a border.
            assert shown["sign"] == pytest.approx(float((few * many > 0).double().mean()), abs=1.5 * one)
            near = float(((ratio <= 10) & (ratio >= 0.1)).double().mean())
            assert shown["magnitude"] == pytest.approx(near, abs=1.5 * one)
            other_U, other_S, other_Vh = torch.linalg.svd(few, full_matrices=False)
            if min(1 - values[R] / values[R - 1] for values in (S, other_S)) < OPEN_GAP:
                continue
            open_gaps += 1
            left = float((U[:, :R].T @ other_U[:, :R]).square().sum()) / R
            right = float((Vh[:R] @ other_Vh[:R].T).square().sum()) / R
            assert shown["overlap"] == pytest.approx((left + right) / 2, abs=OVERLAP_TOLERANCE)
    assert open_gaps > 3 * len(found[0])  # of 4 counts


def test_means():
    rows = [
        {
            "name": f"{i}.q_proj",
            "m": 2,
            "n": size,
            "coverage": {1: size / 10, 2: 1.0},
            "similarity": {1: {"sign": size / 10, "magnitude": 1.0, "overlap": size / 10}},
        }
        for i, size in enumerate((1, 3))
    ]
    means = tables.coverage_means(rows)
    assert means["q_proj"] == means["all"] == pytest.approx({1: 0.2, 2: 1.0})
    assert tables.similarity_means(rows)[1] == pytest.approx({"sign": 0.25, "magnitude": 1.0, "overlap": 0.2})
    least, fewest = tables.answers(rows, 8, 2)
    assert least.endswith("mean over layers: 2")
    assert fewest == "Fewest samples of these whose top spaces (lora.r = 2) overlap those of 8 by 90%: none"


def called(argv):
    """Runs on a rank: exit code and output of the tool."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = command.main(argv)
    return code, output.getvalue()


@pytest.fixture
def config(model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run", init__method="pissa")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "report")]


def test_two_ranks_write_the_report(config, tmp_path):
    asked = [*config, "--local_rank=0", "--samples", "1,4", "--many", "4", "lora.r=3", "data.packing=true"]
    (code, said), (other_code, silence) = run_ranks(2, called, asked, init=False)
    assert (code, other_code, silence) == (0, 0, "")
    assert "gradients, micro-batches of this rank 3/3" in said
    assert f"written: {tmp_path / 'report'}" in said
    found = json.loads((tmp_path / "report" / "coverage.json").read_text())
    assert (found["many"], found["r"], found["run"]["world_size"]) == (4, 3, 2)
    # All of the many are the many again.
    assert found["means"]["similarity"]["4"] == pytest.approx({"sign": 1.0, "magnitude": 1.0, "overlap": 1.0}, abs=1e-4)
    assert 0 < found["means"]["similarity"]["1"]["sign"] < 1
    shown = (tmp_path / "report" / "coverage.md").read_text()
    assert "| all " in shown
    assert "model.layers.3.mlp.down_proj" in shown
    assert (tmp_path / "report" / "coverage.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "1,x"], "--samples 1,x: must be whole numbers from 1 that rise. E.g. 1,2,4,8."),
        (["--samples", "4,2"], "--samples 4,2: must be whole numbers"),
        (["--samples", "0,2"], "--samples 0,2: must be whole numbers"),
        (
            ["--many", "16"],
            "--many 16: must be at least 2 and the last of --samples, 32. Raise it or leave counts out.",
        ),
        (["--out", "."], "--out .: exists. Give a folder that does not."),
        (["lora.q=1"], "lora.q = 1: no such setting."),
    ],
)
def test_arguments_are_refused_before_the_ranks_meet(more, message, config, capsys):
    assert command.main([*config, *more]) == 2
    assert message in capsys.readouterr().err


def too_many(raw, out):
    """Runs on a rank: the error of a report that must not begin, and that no weight was read."""
    from lora_one_dist.base import loading
    from lora_one_dist.commands.coverage.ranks import report

    def never(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    loading.load = never
    with pytest.raises(RuntimeError) as caught:
        report(parse_config(raw), [1], 101, out)
    return str(caught.value)


def test_more_samples_than_there_are_are_refused_before_a_weight_is_read(model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run")
    (message,) = run_ranks(1, too_many, raw, tmp_path / "report")
    assert message.endswith("--many 101: the training data has 100 samples. Lower it or add data.")
    assert not (tmp_path / "report").exists()
