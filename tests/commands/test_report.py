"""tools/report.py: the page says what the files say, needs nothing else, and shows runs that are not whole."""

from __future__ import annotations

import base64
import io
import json
import statistics
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lora_one_dist.base.targets import Target
from lora_one_dist.cluster.launchers import Launch
from lora_one_dist.commands.report import figures
from lora_one_dist.commands.report import runs as report_runs
from lora_one_dist.config.settings import Config
from lora_one_dist.disk import folders
from lora_one_dist.initialise import pairs
from lora_one_dist.run import metrics
from tests import tool

STEPS = 60
HOSTILE = 'bad <b>"x"</b> & $1$'
PROMPT = '</pre><script>alert("1")</script> {prompt}'
PHASES = {"load": 0.5, "gradient": 2.0, "svd": 1.25, "broadcast": 0.25, "set adapters": 0.5, "train": 30.0}
MIB = 2**20


# Made-up runs, written as training writes them ------------------------------------------------------------------------


def settings(folder: Path, **groups: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "model": {"path": "base", "dtype": "fp32"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "lora": {"r": 4},
        "init": {"halves": True} if groups.get("init", {}).get("method", "lora_one") == "lora_one" else {},
        "train": {"max_steps": STEPS},
    }
    merged = {name: base.get(name, {}) | groups.get(name, {}) for name in {*base, *groups}}
    return Config.model_validate({**merged, "output_dir": str(folder)})


def begin(folder: Path, config: Config, went_on: int | None = None) -> metrics.RunFolder:
    """run.json and config.yaml, as at the start of a run."""
    launch = Launch("torchrun", 0, 2, 0, "localhost", 29500)
    earlier = {"id": "first", "identity": {}} if went_on is not None else None
    record = metrics.RunFolder(folder, writes=True)
    about = metrics.describe_run(config, launch, earlier)
    identity = {"config": config.model_dump(mode="json"), "targets": []}
    record.write_json(
        "run.json", {**about, "commit": "0123456789abcdef", "resumed_from": went_on, "identity": identity}
    )
    folders.replace_file(folder / "config.yaml", config.to_yaml())
    return record


def log_steps(record: metrics.RunFolder, steps: int, loss: float) -> None:
    for step in range(1, steps + 1):
        values = {"loss": loss + 3 / step, "lr": 1e-3 * (1 - step / STEPS), "grad_norm": 1 / step}
        speed = {"tokens_per_second": 1000.0 + step, "step_seconds": 0.5}
        ranks = {"slowest_rank": step % 3 % 2, "slowest_rank_seconds": 0.3, "fastest_rank": 1}
        record.log(step, {**values, **speed, **ranks, "fastest_rank_seconds": 0.2, "peak_bytes": 700 * MIB})


def write_init(record: metrics.RunFolder, config: Config) -> None:
    """The report of real decompositions of small random matrices of two blocks."""
    torch.manual_seed(config.train.seed)
    rows = []
    for block in range(2):
        for kind, (m, n) in {"q_proj": (24, 16), "up_proj": (48, 16)}.items():
            parts = [torch.randn(m, n) for _ in range(2 if config.init.halves else 1)]
            target = Target(f"model.layers.{block}.{kind}", m, n, config.lora.r, config.scaling)
            rows.append({**pairs._decompose(target, parts, config)[1], "owner": block})
    loss = {"loss_before": 3.5, "loss_after": 2.25, "target_tokens": 512}
    record.write_json("init_report.json", {"method": config.init.method, **loss, "layers": rows})


MATTHEWS_AT = 0.375  # the loss of the one run whose answers are two words


def finish(record: metrics.RunFolder, loss: float, phases: dict[str, float] = PHASES) -> None:
    before, after = {"eval_loss": 3.25, "exact_match": 0.0}, {"eval_loss": loss, "exact_match": 1 - loss}
    if loss == MATTHEWS_AT:
        before, after = before | {"matthews": 0.0}, after | {"matthews": 0.5}
    record.log(STEPS, after)
    rows = [
        {"phase": name, "seconds": seconds, "peak_bytes": (500 + 10 * i) * MIB}
        for i, (name, seconds) in enumerate(phases.items())
    ]
    record.write_json("summary.json", {"steps": STEPS, "before": before, "after": after, "phases": rows})
    record.close()


def whole(folder: Path, loss: float, **groups: dict[str, Any]) -> None:
    config = settings(folder, **groups)
    record = begin(folder, config)
    record.log(0, {"eval_loss": 3.25, "exact_match": 0.0})
    write_init(record, config)
    log_steps(record, STEPS, loss)
    finish(record, loss)


def crashed(folder: Path) -> None:
    """Between two steps, its last line cut; nothing of the initialisation kept."""
    record = begin(folder, settings(folder, data={"prompt": PROMPT}))
    record.log(0, {"eval_loss": 3.25})
    log_steps(record, 25, 1.0)
    record.log(25, {"eval_loss": 1.5})
    record.log(26, {"loss": float("nan")})
    record.close()
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 27, "lo')


def went_on(folder: Path) -> None:
    config = settings(folder, data={"eval": None})
    record = begin(folder, config, went_on=20)
    log_steps(record, STEPS, 0.5)
    rows = [{"phase": name, "seconds": 7.0, "peak_bytes": 400 * MIB} for name in ("resume", "train")]
    record.write_json("summary.json", {"steps": STEPS, "before": {}, "after": {}, "phases": rows})
    record.close()


# The page as a browser sees it ----------------------------------------------------------------------------------------


@dataclass
class Page(HTMLParser):
    """Tags with their attributes, tables as rows of texts, and what is written outside of tags."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    text: str = ""
    in_cell: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> list[dict[str, str]]:
        """Rows of the one table that has these columns, by column."""
        found = [rows for rows in self.tables if set(heads) <= set(rows[0])]
        assert len(found) == 1
        return [dict(zip(found[0][0], row, strict=True)) for row in found[0][1:]]

    @property
    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep's folder: two seeds of one setting, another setting, another method, and runs that are not whole."""
    root = tmp_path_factory.mktemp("sweep")
    whole(root / "one_0", 0.125, optim={"lr": 5e-3})
    whole(root / "one_1", 0.375, optim={"lr": 5e-3}, train={"max_steps": STEPS, "seed": 1})
    whole(root / "one_low", 0.5, optim={"lr": 1e-3})
    whole(root / "other" / "lora", 0.625, init={"method": "lora"}, optim={"lr": 5e-3})
    crashed(root / HOSTILE)
    went_on(root / "went_on")
    return root


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "report"
    done = tool.run("report", runs, runs / "one_0", "--out", out)
    return done, out, Page((out / "index.html").read_text(encoding="utf-8"))


def test_table_has_the_numbers_of_the_files(made, runs):
    rows = {row["run"]: row for row in made[2].table("run", "tokens/s")}
    assert set(rows) == {"one_0", "one_1", "one_low", "other/lora", HOSTILE, "went_on"}
    lines = [json.loads(line) for line in (runs / "one_1/metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert rows["one_1"] == {
        "#": rows["one_1"]["#"],
        "run": "one_1",
        "optim.lr": "0.005",
        "train.seed": "1",
        "init.method": "lora_one",
        "init.halves": "true",
        "data.prompt": "{prompt}",
        "data.eval": "eval.jsonl",
        "steps": "60/60",
        "last training loss": f"{0.375 + 3 / STEPS:.4f}",
        "held-out loss before": "3.2500",
        "held-out loss after": "0.3750",
        "exact match before": "0.0000",
        "exact match after": "0.6250",
        "Matthews before": "0.0000",
        "Matthews after": "0.5000",
        "tokens/s": f"{statistics.median(speeds):.0f}",
        "peak MiB": "700",
        "init s": "4.00",
    }
    assert rows["other/lora"]["init.method"] == "lora"
    assert rows["other/lora"]["Matthews after"] == "-"
    assert "lora.r" not in rows["one_1"]  # the same in all


def test_methods_are_compared_at_their_best_setting_over_its_seeds(made):
    best, other = made[2].table("method", "settings tried")
    assert (best["method"], best["settings tried"], best["runs"], best["seeds"]) == ("lora_one", "2", "2", "0, 1")
    assert best["held-out loss"] == f"0.2500 ± {statistics.stdev([0.125, 0.375]):.4f}"
    assert best["exact match"] == f"0.7500 ± {statistics.stdev([0.875, 0.625]):.4f}"
    assert (other["method"], other["held-out loss"], other["exact match"]) == ("lora", "0.6250", "0.3750")
    assert (best["Matthews"], other["Matthews"]) == ("0.5000", "-")
    assert "unequal numbers of settings" in made[2].text


def test_every_figure_is_a_picture_in_the_page_and_beside_it(made):
    _, out, page = made
    files = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert sorted(page.images) == sorted(files.values())
    names = {name.rpartition(".")[0] for name in files}
    fixed = {"loss", "lr", "grad_norm", "tokens_per_second", "seconds", "memory", "methods"}
    assert fixed < names
    maps = {name for name in names - fixed if name.endswith("-map")}
    assert len(maps) == 2  # one for each seed of lora_one; the others have no SVD or no report
    assert names - fixed - maps == {name.replace("-map", "-depth") for name in maps}
    for content in files.values():
        pixels = plt.imread(io.BytesIO(content), format="png")
        assert pixels.shape[1] >= 800
        assert pixels[..., :3].std() > 0.01  # something is drawn


def test_page_needs_nothing_else(made):
    _, _, page = made
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
        assert tag == "img" or "src" not in attributes
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert not any(word in style for word in ("url(", "@import", "//"))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} == targets


def test_names_and_settings_are_text(made):
    _, _, page = made
    assert HOSTILE not in page.source
    assert PROMPT not in page.source
    assert HOSTILE in page.text
    assert f"data.prompt: {PROMPT}" in page.text


def test_runs_that_are_not_whole_are_shown_with_what_they_have(made):
    done, _, page = made
    rows = {row["run"]: row for row in page.table("run", "tokens/s")}
    bad = rows[HOSTILE]
    assert (bad["steps"], bad["held-out loss before"], bad["held-out loss after"]) == (
        "26/60",
        "3.2500",
        "1.5000 at step 25",
    )
    assert (bad["exact match after"], bad["init s"], bad["peak MiB"]) == ("-", "-", "700")
    assert (bad["last training loss"], bad["tokens/s"]) == (f"{1 + 3 / 25:.4f}", "1013")
    for note in (
        "not finished: step 26 of 60 is the last logged; it runs, was stopped, or crashed",
        "metrics.jsonl: line 29 is cut or damaged, left out",
        "no init_report.json: nothing on the initialisation",
        "1 logged losses are not finite: not drawn",
    ):
        assert f"{HOSTILE}: {note}" in done.stdout
        assert note in page.text
    on = rows["went_on"]
    assert (on["steps"], on["held-out loss after"], on["init s"], on["peak MiB"]) == ("60/60", "-", "-", "700")
    assert "started 2 times, the last from step 20: seconds and memory by phase are of that start alone" in page.text
    assert "went_on: no held-out data: no evaluation" in done.stdout
    assert "lora: lora takes no SVD" in done.stdout


def test_header_of_a_run(made):
    _, _, page = made
    heads = [{row[0]: row[1] for row in rows} for rows in page.tables if rows[0][0] == "folder"]
    head = next(head for head in heads if head["folder"].endswith("one_1"))
    assert (head["method"], head["r"], head["model"]) == ("lora_one", "4", "base, fp32")
    assert (head["ranks"], head["commit"]) == ("2, launched by torchrun", "0123456789abcdef")
    assert f"torch={metrics.versions()['torch']}" in head["versions"]
    assert "stage=3" in head["base"]
    assert head["loss of the init batch"] == "3.500000 before, 2.250000 with the adapters set, 512 target tokens"
    assert head["layers"] == "4, on 2 owners"
    assert head["slowest rank"] == "0 in 40 of 60 logged steps; slowest over fastest rank: 1.50 (median)"


# Figures --------------------------------------------------------------------------------------------------------------


def test_map_shows_the_coverage_of_the_files_and_frames_r(runs, monkeypatch):
    run = report_runs.read(runs / "one_0", "one_0")
    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    figures.initialisation(run, "init")
    monkeypatch.undo()
    layers = json.loads((runs / "one_0/init_report.json").read_text())["layers"]
    map_, depth = kept
    panels = {axes.get_title(): axes for axes in map_.axes}
    for kind in ("q_proj", "up_proj"):
        own = [row["coverage"] for row in layers if row["name"].endswith(kind)]
        ranks = [label.get_text() for label in panels[kind].get_xticklabels()]
        assert ranks == ["1", "2", "4", "8", "16"]
        expected = np.array([[row[rank] for rank in ranks] for row in own])
        np.testing.assert_array_equal(panels[kind].images[0].get_array(), expected)
        (frame,) = panels[kind].patches
        assert (frame.get_x(), frame.get_width(), frame.get_height()) == (ranks.index("4") - 0.5, 1, 2)
    covered, errors, overlaps = ([list(line.get_ydata()) for line in axes.get_lines()] for axes in depth.axes)
    assert covered == [[row["coverage"]["4"] for row in layers[i::2]] for i in range(2)]
    assert errors[:2] == [[row["certified_error"] for row in layers[i::2]] for i in range(2)]
    assert overlaps == [[row["half_overlap"] for row in layers[i::2]] for i in range(2)]
    for canvas in kept:
        plt.close(canvas)


def test_smoothing_is_a_mean_over_neighbours():
    values = np.sin(np.arange(100.0)) + 5
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(100)]  # 1/25 of 100 steps: 2 to each side
    np.testing.assert_allclose(figures.smooth(values), expected, rtol=1e-12)
    np.testing.assert_array_equal(figures.smooth([3.0, 1.0, 2.0]), [3.0, 1.0, 2.0])  # too few to smooth
    assert figures.smooth([]).size == 0


@pytest.mark.parametrize(
    ("name", "depth"), [("model.layers.12.mlp.up_proj", 12), ("transformer.h.3.attn", 3), ("lm.q2_proj", 7)]
)
def test_depth_is_the_number_of_the_block(name, depth):
    assert figures.depth_of(name, order=7) == depth


# Reading --------------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_once_and_not_inside_a_run(runs, tmp_path):
    (runs / "one_0/checkpoints/step-60").mkdir(parents=True)
    (runs / "one_0/checkpoints/step-60/run.json").write_text("{}")
    found = report_runs.find([runs / "one_1", runs])
    assert [run.name for run in found] == ["one_1", HOSTILE, "one_0", "one_low", "other/lora", "went_on"]
    assert [run.number for run in found] == [1, 2, 3, 4, 5, 6]
    (alone,) = report_runs.find([runs / "other"])
    assert alone.name == "lora"


def test_summary_of_a_shorter_start_is_left_out(runs, tmp_path):
    folder = tmp_path / "longer"
    whole(folder, 0.5)
    begin(folder, settings(folder, train={"max_steps": 90}), went_on=STEPS).close()
    run = report_runs.read(folder, "longer")
    assert run.summary is None
    assert f"summary.json is of an earlier start with {STEPS} steps: left out" in run.notes
    assert run.result("after", "eval_loss") is None


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("summary.json", "{", "summary.json cannot be read"),
        ("summary.json", '{"steps": 60}', "summary.json lacks before, after, phases: left out"),
        ("run.json", "[]", "run.json lacks an object: left out"),
        ("config.yaml", "a: [", "the settings are those in run.json"),
        ("metrics.jsonl", '[1]\n{"step": "2"}\n', "metrics.jsonl: line 1, 2 is cut or damaged"),
        ("run.json", None, "run.json is missing: versions, commit and hardware are unknown"),
        ("metrics.jsonl", None, "metrics.jsonl is missing: no curves"),
    ],
)
def test_damaged_files_are_notes(tmp_path, name, content, note):
    folder = tmp_path / "run"
    begin(folder, settings(folder)).close()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    run = report_runs.read(folder, "run")
    assert any(note in each for each in run.notes), run.notes
    assert run.method == "lora_one"


# Refusals and replacement ---------------------------------------------------------------------------------------------


def small(folder: Path) -> Path:
    record = begin(folder, settings(folder))
    record.log(1, {"loss": 2.0})
    record.close()
    return folder


def test_folders_without_a_run_are_refused(tmp_path):
    (tmp_path / "empty/inner").mkdir(parents=True)
    run = small(tmp_path / "run")
    for given, why in (
        (tmp_path / "empty", "holds no run (run.json or metrics.jsonl)"),
        (tmp_path / "no", "is no folder"),
    ):
        done = tool.run("report", run, given, "--out", tmp_path / "out", check=False)
        assert done.returncode == 1
        assert f"error: {given}: {why}" in done.stderr
        assert "Give the output_dir of a run" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "run", "page", "more", "link"])
def test_out_that_is_no_report_is_refused_and_left_as_it_was(tmp_path, kind):
    out, run = tmp_path / "out", small(tmp_path / "run")
    if kind == "file":
        out.write_text("mine")
    elif kind == "run":
        out = run
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "index.html").write_text("mine")
    if kind == "more":
        tool.run("report", run, "--out", tmp_path / "made")
        (out / "index.html").write_bytes((tmp_path / "made/index.html").read_bytes())
        (out / "notes.txt").write_text("mine")
    before = sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    done = tool.run("report", run, "--out", out, check=False)
    assert done.returncode == 1
    assert f"error: --out {out}: " in done.stderr
    assert "Give another --out" in done.stderr
    assert before == sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))


def test_older_report_is_replaced(tmp_path):
    out, run = tmp_path / "deep/report", small(tmp_path / "run")
    tool.run("report", run, "--out", out)
    (out / "stale.png").write_bytes(b"of a figure that is no longer drawn")
    record = metrics.RunFolder(run, writes=True, step=1, keep_bytes=10_000)
    record.log(2, {"loss": 1.0625})
    record.close()
    done = tool.run("report", run, "--out", out)
    assert done.stdout.endswith(f"1 run, 1 figures -> {out}/index.html\n")
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "loss.png"]
    assert "1.0625" in (out / "index.html").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["report"]  # nothing left beside
