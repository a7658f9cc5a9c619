"""Minutes and memory of tokenising chats, here and in another checkout of ours; and of one chat, by its length.

    git worktree add /tmp/before 14e394e
    python tools/bench/tokenization.py --before /tmp/before

Chats of 4 turns of random words through the demo's tokenizer and template, as `launch/train.py` tokenises them: with
one worker and with one a core here, and as the other checkout does.  Long chats are read by one process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.encode import Encoder
from lora_one_dist.data.rows import Chunk
from lora_one_dist.data.tokenizer import load_tokenizer
from tools.bench import harness

WORDS = ["the", "sum", "of", "a", "and", "b", "is", "what", "we", "add", "then", "take", "away", "how", "many", "left"]
TURNS = (20, 40, 10, 30)  # words of each
MODEL = harness.ROOT / "launch" / "demo" / "model"
EXCHANGES = (20, 40, 80, 160, 1000)
# Run by the checkout's own code: prints seconds, tokens, and MiB of this process and of its largest child.
TOKENIZE = """
import json, resource, sys, time
import datasets
from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.samples import tokenize
from lora_one_dist.data.tokenizer import load_tokenizer

if __name__ == "__main__":
    model, rows, cache, options = sys.argv[1:]
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    config = DataConfig(train=rows, format="chat", max_length=512, **json.loads(options))
    began = time.perf_counter()
    data = tokenize(load_rows(rows, "train", None), load_tokenizer(model, False), config)
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([seconds, data.num_tokens, *peaks]))
"""


def chats(count: int, turns: tuple[int, ...], seed: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for _ in range(count):
        said = [" ".join(draw.choices(WORDS, k=words)) for words in turns]
        roles = ["user", "assistant"] * (len(turns) // 2)
        yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]}


def measure(folder: Path, checkout: Path, options: dict[str, Any], told: list[list[int]]) -> float:
    """Seconds of tokenising the folder's rows in a process of its own, nothing cached."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        script = Path(cache) / "tokenize_rows.py"  # a file: the workers import it
        script.write_text(TOKENIZE, encoding="utf-8")
        given = [str(MODEL), str(folder / "rows.jsonl"), cache, json.dumps(options)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [sys.executable, script, *given], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True
        )
        if ran.returncode:
            raise SystemExit(f"{checkout}: tokenising ended with {ran.returncode}, see above")
        seconds, *counted = json.loads(ran.stdout.splitlines()[-1])
        told.append(counted)
        return seconds


def by_length() -> list[dict[str, Any]]:
    """CPU seconds of one chat to its ids and labels: the least of five."""
    config = DataConfig(train="rows.jsonl", format="chat", max_length=10**6)
    encoder = Encoder(load_tokenizer(str(MODEL), False), config, datetime.date(2026, 1, 2))
    rows = []
    for exchanges in EXCHANGES:
        (chat,) = chats(1, TURNS[:2] * exchanges, exchanges)
        chunk, seconds = Chunk(0, [json.dumps(chat).encode()]), []
        for _ in range(5):
            began = time.process_time()
            tokens = len(encoder.encode(chunk)["input_ids"][0])
            seconds.append(time.process_time() - began)
        least = min(seconds)
        rows.append({"exchanges": exchanges, "tokens": tokens, "CPU ms": 1e3 * least})
        rows[-1]["µs an exchange"] = 1e6 * least / exchanges
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--chats", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways: dict[str, tuple[Path, dict[str, Any]]] = {
        f"{workers} workers": (harness.ROOT, {"workers": workers}) for workers in (1, cores)
    }
    if arguments.before is not None:
        ways["before"] = (arguments.before.resolve(), {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(chat) + "\n" for chat in chats(arguments.chats, TURNS, 0))
        lengths = by_length()
        told: dict[str, list[list[int]]] = {name: [] for name in ways}
        work = {name: partial(measure, folder, *way, told[name]) for name, way in ways.items()}
        seconds = harness.alternate(work, arguments.rounds)
    for row in lengths:
        harness.record("tokenization, one chat", row)
    rows = []
    for name, values in seconds.items():
        tokens, here, child = (max(column) for column in zip(*told[name], strict=True))
        row = {"way": name, "chats": arguments.chats, "tokens": tokens}
        row["times_one_worker"] = harness.paired_ratio(seconds["1 workers"], values)
        row |= {"peak MiB": here, "a worker's peak MiB": child}
        harness.record("tokenization", {**row, "seconds": harness.summary(values)})
        rows.append({**row, "minutes": harness.summary(values)["median"] / 60})
    print(markdown.table(lengths), markdown.table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
