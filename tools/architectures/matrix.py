"""Every model type of transformers that trains here, or why not: results/architectures.md.

    python tools/architectures/matrix.py --out runs/architectures                      all, one after another
    python tools/architectures/matrix.py --out runs/architectures --only llama,gpt2    some
    python tools/architectures/matrix.py --out runs/architectures --report_only        the table of what is done

A tiny model of each type (:mod:`tiny`) with random weights is saved, initialised and trained for two steps by
`launch/train.py`'s own code (:mod:`one`), at 1 and 2 ranks under ZeRO-3, and held against one process of plain
autograd: the gradient of every target, and PEFT's held-out loss with the adapter that was exported.  What is done is
not done again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from tools.architectures import one
from tools.bench import harness

WARM = multiprocessing.get_context("forkserver")  # its processes have imported everything
TABLE = harness.ROOT / "results" / "architectures.md"
SECONDS = 600
RANKS = (1, 2)
WITHIN = 1e-5  # of the gradient's norm, and of losses: fp32 in another order of summation
TIMES = 3  # the error of plain autograd in fp32: a decay's gradient, a sum of what cancels, is far from float64's


def run_one(out: Path, kind: str) -> None:
    """Build, train at each number of ranks, compare; ``out/kind/result.json`` says what came of it."""
    folder = out / kind
    shutil.rmtree(folder, ignore_errors=True)  # what a run of before left
    folder.mkdir(parents=True)
    found: dict[str, Any] = {"kind": kind, "commit": harness.commit()}
    for step in ("build", *(f"train{ranks}" for ranks in RANKS), "compare"):
        told = _call(folder, step)
        found |= told
        if "reason" in told:
            break
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
    print(f"{kind}: {verdict(found)}", flush=True)


def _call(folder: Path, step: str) -> dict[str, Any]:
    """What a step of ``one.py`` wrote, a process for each rank."""
    ranks = int(step.removeprefix("train")) if step.startswith("train") else 1
    processes = []
    launch = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for rank in range(ranks):
        mine = launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(WARM.Process(target=one.main, args=(folder, step, mine)))
        processes[-1].start()
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if None in codes:
        return {"step": step, "reason": f"no end within {SECONDS} s", "late": True}
    told = folder / f"{step}.json"
    if told.is_file():
        return json.loads(told.read_text(encoding="utf-8"))
    last = (folder / f"{step}.0.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
    return {"step": step, "reason": f"ended with {codes}: {''.join(last):.200}", "late": True}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def verdict(found: Mapping[str, Any]) -> str:
    """In a word or two, and the reason."""
    if "reason" in found:
        how = "FAILS LATE" if found.get("late") else "not built here" if found["step"] == "build" else "refused"
        return f"{how}: {found['reason']}"
    right = [found[f"{name}{ranks}"] <= WITHIN for name in ("before", "peft") for ranks in RANKS]
    right += [found[f"gradient{ranks}"] <= max(WITHIN, TIMES * found[f"autograd{ranks}"]) for ranks in RANKS]
    return f"{'works' if all(right) else 'WRONG'}, {found['road']}"


def write_table(out: Path, path: Path) -> None:
    """What works with its figures, and by their verdict the others with the reason."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*/result.json"))]
    told = [(found, *verdict(found).partition(": ")[::2]) for found in results]
    counts = Counter(how.partition(",")[0] for _, how, _ in told)
    about = harness.about()
    commits = ", ".join(f"{count} at {commit}" for commit, count in Counter(f["commit"] for f in results).most_common())
    lines = [
        f"# Every model type of transformers {about['versions']['transformers']}",
        "",
        f"`{about['command']}`, {about['date']}, {about['hardware']}, {about['versions']}; {commits}.",
        "",
        "Tiny models with random weights, fp32. gradient: the largest error of a target's one-step gradient against",
        "float64, relative, at 1 and 2 ranks; autograd: that of one process of plain autograd, of the same target;",
        "peft: how far PEFT's held-out loss with the exported adapter is from the run's, relative.",
        "",
        f"{', '.join(f'{count} {name}' for name, count in counts.most_common())}.",
    ]
    figures = [name + str(ranks) for name in ("gradient", "autograd", "peft") for ranks in RANKS]
    ran = [
        {"type": found["kind"], "": how} | {name: found[name] for name in figures}
        for found, how, why in told
        if not why
    ]
    experts = [found["kind"] for found, _, why in told if "mixture" in why]
    others = [(found["kind"], how, why) for found, how, why in told if why and "mixture" not in why]
    lines += ["", "## Ran", "", markdown.table(ran)]
    lines += ["", f"## Refused as mixtures of experts ({len(experts)})", "", ", ".join(experts) + "."]
    lines += ["", "## Others", "", *(f"- **{kind}**, {how}: {why}" for kind, how, why in others)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and runs")
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--at_once", type=int, default=1, help="types at one time (1)")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"({TABLE.relative_to(harness.ROOT)})")
    arguments = parser.parse_args()
    kinds = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
    if arguments.only:
        kinds = arguments.only.split(",")
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    WARM.set_forkserver_preload(["tools.architectures.one", "lora_one_dist.run.story"])
    left = [kind for kind in kinds if not (arguments.out / kind / "result.json").is_file()]
    if not arguments.report_only:
        with ThreadPoolExecutor(arguments.at_once) as pool:
            list(pool.map(lambda kind: run_one(arguments.out.resolve(), kind), left))
    write_table(arguments.out, arguments.table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
