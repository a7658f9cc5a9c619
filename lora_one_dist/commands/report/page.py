"""Run folders to one page: what they were, what they did, how they compare.

    python tools/report.py runs/mine --out report
    python tools/report.py runs/a runs/b --out report            side by side
    python tools/report.py runs/sweep --out report               all runs below a folder

Writes a folder with index.html, which holds its figures and needs nothing else (no network, no JavaScript), and each
figure as a PNG.  A run that still runs, was stopped or crashed is shown with what it has.  An older report in --out is
replaced; anything else there is refused.  Reads the text files of a run alone, so that it works where they were copied.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from lora_one_dist.commands.report import figures as report_figures
from lora_one_dist.commands.report import runs as report_runs
from lora_one_dist.commands.report.figures import Figure
from lora_one_dist.commands.report.runs import MISSING, Best, ReportError, Run, shown
from lora_one_dist.config import paths

PAGE = "index.html"
MARK = '<meta name="generator" content="lora_one_dist tools/report.py">'  # makes a folder a report, to be replaced
MOST_OPEN = 3  # runs of which the details are unfolded
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --warn: #b45f06; }
@media (prefers-color-scheme: dark) {
  :root { --warn: #f0a860; }
  img { filter: invert(0.92) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption { font-size: 0.85rem; }
details { border: 1px solid var(--line); border-radius: 6px; padding: 0.4rem 0.8rem; margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 600; } details details summary { font-weight: normal; }
.note { color: var(--warn); } pre { overflow-x: auto; background: var(--soft); padding: 0.6rem; font-size: 0.8rem; }
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=paths.argument, nargs="+", help="output_dir of a run, or a folder of such folders")
    parser.add_argument(
        "--out", type=paths.argument, required=True, help="folder to make, or an older report to replace"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        refuse_used(arguments.out)
        runs = report_runs.find(arguments.runs)
        page, figures = report(runs)
        write(arguments.out, page, figures)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{count}, {len(figures)} figures -> {arguments.out / PAGE}")
    return 0


# The folder -----------------------------------------------------------------------------------------------------------


def refuse_used(out: Path) -> None:
    """Raise ReportError unless the folder is new, empty or a report."""
    remedy = "Give another --out, or remove it."
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise ReportError(f"--out {out}: is no folder. {remedy}")
    files = sorted(out.iterdir())
    page = out / PAGE
    if files and not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")):
        raise ReportError(f"--out {out}: exists and is no report. {remedy}")
    foreign = [file.name for file in files if file.is_dir() or not (file.name == PAGE or file.suffix == ".png")]
    if foreign:
        raise ReportError(f"--out {out}: is a report, but holds {', '.join(foreign)} besides. {remedy}")


def write(out: Path, page: str, figures: Sequence[Figure]) -> None:
    """Beside, then in place of the older report: the folder is whole or as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        for figure in figures:
            (made / f"{figure.name}.png").write_bytes(figure.png)
        (made / PAGE).write_text(page, encoding="utf-8")
        if out.exists():
            shutil.move(out, Path(scratch) / "old")
        made.rename(out)


# The page -------------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Run]) -> tuple[str, list[Figure]]:
    """The page and the figures that it holds."""
    style = report_figures.Style(runs)
    best = report_runs.best_of_methods(runs)
    compared = best if sum(run.result("after", "eval_loss") is not None for run in runs) > 1 else []
    methods = [figure] if (figure := report_figures.methods(compared)) is not None else []
    curves, phases = report_figures.training(runs, style), report_figures.phases(runs, style)
    starts = initialisations(runs)
    sections = {
        "Runs": comparison(runs),
        "Methods": method_table(compared) + show(methods) if compared else "",
        "Training": show(curves),
        "Seconds and memory": show(phases),
        "Initialisation": "".join(text + show(figures) for text, figures in starts),
        "Each run": "".join(details(run, len(runs) <= MOST_OPEN) for run in runs),
    }
    figures = [*methods, *curves, *phases, *(figure for _, inner in starts for figure in inner)]
    return document(runs, {title: content for title, content in sections.items() if content}), figures


def document(runs: Sequence[Run], sections: dict[str, str]) -> str:
    title = f"Report on {runs[0].name}" if len(runs) == 1 else f"Report on {len(runs)} runs"
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{anchors[name]}"><h2>{name}</h2>{content}</section>\n' for name, content in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f"<p>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p><nav>{links}</nav>\n{body}</body></html>\n"
    )


def show(figures: Iterable[Figure]) -> str:
    shown = [
        f'<figure><img alt="{escape(figure.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(figure.png).decode()}">'
        f"<figcaption><b>{escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>\n"
        for figure in figures
    ]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Texts to the left, numbers as :func:`number` writes them to the right; all of it escaped.

    Columns without a value are left out.
    """
    rows = [list(row) for row in rows]
    kept = [i for i in range(len(heads)) if any(row[i] != MISSING for row in rows)]
    heads, rows = [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = []
    for row in rows:
        cells = (
            f'<td class="number">{escape(cell)}</td>' if isinstance(cell, Number) else f"<td>{escape(str(cell))}</td>"
            for cell in row
        )
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{"".join(lines)}</tbody></table></div>'


class Number(str):
    """A cell that is set to the right."""


def number(value: float | None, form: str = ".4f") -> Number:
    return Number(MISSING if value is None else format(value, form))


def comparison(runs: Sequence[Run]) -> str:
    """What differs between the runs, and how they ended; below it their notes."""
    settings, scores = report_runs.differing(runs), report_runs.scored(runs)
    scale = report_figures.MIB
    heads = ["#", "run", "steps", "last training loss", "held-out loss before", "held-out loss after"]
    heads += [f"{name} {when}" for name in scores.values() for when in ("before", "after")]
    heads += ["tokens/s", "peak MiB", "init s", *settings]
    rows = []
    for run in runs:
        losses = run.series("loss")[1]
        peak = run.peak_bytes
        rows.append(
            [
                Number(run.number),
                run.name,
                Number(steps_of(run)),
                number(losses[-1] if losses else None),
                number(run.result("before", "eval_loss")),
                last_held_out(run),
                *(number(run.result(when, key)) for key in scores for when in ("before", "after")),
                number(run.tokens_per_second, ".0f"),
                number(peak / scale if peak is not None else None, ".0f"),
                number(run.init_seconds, ".2f"),
                *(run.facts.get(key, MISSING) for key in settings),
            ]
        )
    notes = [f'<li class="note">{escape(run.label)}: {escape(note)}</li>' for run in runs for note in run.notes]
    legend = (
        "tokens/s: median of the logged steps. peak: of the fullest rank in any phase. init: gradient to adapters set."
    )
    return f"{table(heads, rows)}<p>{legend}</p>" + (f"<ul>{''.join(notes)}</ul>" if notes else "")


def steps_of(run: Run) -> str:
    done = run.total if run.summary is not None else run.last_step
    return f"{done}/{run.total if run.total is not None else '?'}"


def last_held_out(run: Run) -> Number:
    """At the end, or of a run that has not ended its last one, and where that was."""
    steps, losses = run.series("eval_loss")
    if run.summary is None and steps and steps[-1] > 0:
        return Number(f"{losses[-1]:.4f} at step {steps[-1]}")
    return number(run.result("after", "eval_loss"))


def method_table(best: Sequence[Best]) -> str:
    """The best of each method, and what makes the comparison unfair."""
    chosen = [run for each in best for run in each.runs]
    settings = [key for key in report_runs.differing(chosen) if key in chosen[0].config]
    settings = [key for key in settings if key not in ("init.method", "init.adapter", "train.seed")]
    scores = report_runs.scored(chosen)
    heads = ["method", *settings, "settings tried", "runs", "seeds", "held-out loss", *scores.values()]
    rows = [
        [
            each.method,
            *(each.runs[0].facts.get(key, MISSING) for key in settings),
            Number(each.tried),
            Number(len(each.runs)),
            ", ".join(each.seeds),
            spread(each.values("eval_loss")),
            *(spread(each.values(key)) for key in scores),
        ]
        for each in best
    ]
    text = (
        "Of each method the setting with the lowest held-out loss, averaged over runs that differ in their seed alone; "
        "± is the standard deviation over them. It was chosen on the data that it is shown for: the best of many "
        "settings looks better than it is. Only finished runs count."
    )
    tried = {each.tried for each in best}
    if len(tried) > 1:
        text += " The methods had unequal numbers of settings to choose from: the comparison favours those with more."
    return f"<p>{escape(text)}</p>{table(heads, rows)}"


def spread(values: Sequence[float]) -> Number:
    """Mean, and standard deviation if there are several."""
    if len(values) < 2:
        return number(values[0] if values else None)
    return Number(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")


def initialisations(runs: Sequence[Run]) -> list[tuple[str, list[Figure]]]:
    """Text and figures of each init report; runs with the same one share them."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        if run.covered_layers:
            rows = [[row["name"], row["coverage"], row["certified_error"]] for row in run.covered_layers]
            same.setdefault(json.dumps([run.method, run.r, rows]), []).append(run)
    found = []
    for group in same.values():
        first = group[0]
        names = ", ".join(run.label for run in group)
        text = " ".join(coverage_text(first))
        found.append(
            (
                f"<h3>{escape(names)}</h3><p>{escape(text)}</p>",
                report_figures.initialisation(first, f"init-{first.number}"),
            )
        )
    return found


def coverage_text(run: Run) -> list[str]:
    """Sentences on what r covers, the certificate and the halves."""
    rows, sentences = run.covered_layers, []
    at = [row["coverage"][run.r] for row in rows if run.r in row["coverage"]]
    if at:
        mean = statistics.mean(at)
        sentences.append(
            f"Rank {run.r} covers {min(at):.1%} to {max(at):.1%} of a layer's energy, {mean:.1%} on average."
        )
    worst = max(rows, key=lambda row: row["certified_error"])
    sentences.append(f"Largest certified error of a top space: {worst['certified_error']:.1e} ({worst['name']}).")
    overlaps = [row["half_overlap"] for row in rows if row["half_overlap"] is not None]
    if overlaps:
        sentences.append(f"The top spaces of the batch's halves overlap by {statistics.mean(overlaps):.1%} on average.")
    return sentences


def details(run: Run, unfolded: bool) -> str:
    """Header of one run, its notes and all of its settings."""
    facts = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>\n" for name, text in header(run).items()]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    settings = "\n".join(f"{key}: {shown(value)}" for key, value in run.config.items())
    return (
        f"<details{' open' if unfolded else ''}><summary>{escape(run.label)}</summary>{notes}"
        f'<table class="facts">{"".join(facts)}</table>'
        f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details></details>\n"
    )


def header(run: Run) -> dict[str, str]:
    """What the run was, by name; only what is known."""
    about, init = run.about, run.init or {}
    starts = len(about.get("earlier_starts") or []) + 1
    owners = {row["owner"] for row in init.get("layers", []) if "owner" in row}
    facts = {
        "folder": str(run.folder),
        "method": run.method,
        "r": shown(run.r),
        "model": f"{shown(run.config.get('model.path'))}, {shown(run.config.get('model.dtype'))}",
        "ranks": f"{shown(about.get('world_size'))}, launched by {shown(about.get('launch'))}" if about else MISSING,
        "device": shown(about.get("device")),
        "base": f"{shown(report_runs.flatten(about.get('deepspeed') or {}))}",
        "steps": steps_of(run),
        "layers": f"{len(init['layers'])}, on {len(owners)} owners" if init.get("layers") else MISSING,
        "loss of the init batch": init_losses(init),
        "slowest rank": slowest(run),
        "commit": shown(about.get("commit")),
        "versions": shown({"python": about.get("python"), **(about.get("versions") or {})} if about else None),
        "command": " ".join(map(str, about.get("command") or [])) or MISSING,
        "starts": str(starts) if about else MISSING,
    }
    return {name: text for name, text in facts.items() if text != MISSING}


def init_losses(init: dict[str, Any]) -> str:
    if not {"loss_before", "loss_after", "target_tokens"} <= init.keys():
        return MISSING
    return (
        f"{init['loss_before']:.6f} before, {init['loss_after']:.6f} with the adapters set, "
        f"{init['target_tokens']} target tokens"
    )


def slowest(run: Run) -> str:
    """The rank that is the slowest most often, and by how much over the fastest."""
    lines = [
        line for line in run.lines if {"slowest_rank", "slowest_rank_seconds", "fastest_rank_seconds"} <= line.keys()
    ]
    if not lines:
        return MISSING
    rank = statistics.mode(line["slowest_rank"] for line in lines)
    often = sum(line["slowest_rank"] == rank for line in lines)
    ratio = statistics.median(line["slowest_rank_seconds"] / line["fastest_rank_seconds"] for line in lines)
    return f"{rank} in {often} of {len(lines)} logged steps; slowest over fastest rank: {ratio:.2f} (median)"
