"""What the benchmarks share: alternating measurements, rows with all that a number needs.

Ours and the peer run alternately in one command, because the machine's speed wanders: compare the ratios of a row, not
seconds of two days.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "bench.jsonl"
PACKAGES = ("torch", "transformers", "peft", "deepspeed")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_config(shape: tuple[int, ...]) -> Any:
    """A Llama's.  shape: hidden, intermediate, layers, heads, key/value heads, words."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, groups, words = shape
    return LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def make_model(folder: Path, shape: tuple[int, ...]) -> int:
    """Write a Llama with random weights and a tokenizer of one token a word (w3, w4, ...).

    Args:
        shape: as :func:`model_config` takes it.

    Returns:
        The number of parameters.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(shape))
    model.save_pretrained(folder)
    save_tokenizer(folder, shape[-1])
    return sum(parameter.numel() for parameter in model.parameters())


def save_tokenizer(folder: Path, words: int, also: Sequence[str] = ()) -> None:
    """Write the tokenizer of one token a word; ``also`` stand in the places of the first words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first = ["<pad>", "<s>", "</s>", *also]
    vocabulary = {word: i for i, word in enumerate([*first, *(f"w{i}" for i in range(len(first), words))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def alternate(measures: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each measure returns, in ``repeats`` rounds over all of them; every other round backwards."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for i in range(repeats):
        for name in list(measures)[:: -1 if i % 2 else 1]:
            gc.collect()
            found[name].append(measures[name]())
            print(f"  round {i + 1}/{repeats}  {name}: {found[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a piece of work, the GPU's included."""
    _synchronize()
    began = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and range of repeated measurements."""
    return {"median": median(seconds), "least": min(seconds), "most": max(seconds), "rounds": len(seconds)}


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster ours is: the median over rounds of the ratio within a round."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def about() -> dict[str, Any]:
    """What a number needs beside it: date, hardware, versions, commit and command."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "command": "python " + " ".join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
    }


def record(bench: str, row: Mapping[str, Any]) -> None:
    """Append a row to results/bench.jsonl, with what :func:`about` says."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"bench": bench, **about(), **row}) + "\n")


@functools.cache
def commit() -> str:
    """This checkout's, with -dirty if it was changed before the first row: the rows change a file themselves."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"
