"""The study's bases: Llamas of 5.5 M and 1.9 M parameters and their tokenizer, trained on Debian's documentation.

    python tools/study/base.py --packages runs/study/packages --out runs/study/base --steps 600

In: packages (:mod:`corpus`), fetched if need be.  Out: a model folder and ``base.json``, which says what it was made
from and what it has learnt.  The folder appears when it is whole.  The same command gives the same weights only
at the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a plain checkout too

from tools.study import corpus, tasks

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
VOCAB_SIZE = 4096
ROW_LENGTH, ROWS = 64, 32
PEAK_RATE, WARMUP_SHARE, WEIGHT_DECAY = 3e-3, 0.05, 0.1
HELD_OUT_ROWS, LOG_STEPS = 128, 25


@dataclass(frozen=True)
class Size:
    """Of a base."""

    hidden: int
    intermediate: int
    layers: int = 4
    heads: int = 4


DEFAULT = "1.9M"
SIZES = {"5.5M": Size(256, 768), "1.9M": Size(128, 384)}


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE tokens: any text comes back as it was, spaces included."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    begin = SPECIAL["bos_token"]
    inner.post_processor = processors.TemplateProcessing(
        f"{begin} $A", f"{begin} $A {begin} $B", [(begin, inner.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=128, clean_up_tokenization_spaces=False, **SPECIAL
    )


def make_model(tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=2 * ROW_LENGTH,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def draw_rows(tokenizer: Any, texts: Sequence[str], seed: int) -> Iterator[torch.Tensor]:
    """Batches (ROWS, ROW_LENGTH) of one stream of paragraphs, each from bos to eos, in a new order every time round."""
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    rng, stream = random.Random(seed), []
    while True:
        rng.shuffle(encoded)
        for ids in encoded:
            stream += ids
            while len(stream) >= ROWS * ROW_LENGTH:
                yield torch.tensor(stream[: ROWS * ROW_LENGTH]).view(ROWS, ROW_LENGTH)
                stream = stream[ROWS * ROW_LENGTH :]


def train(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int) -> None:
    """Next-token training by AdamW, with a linear warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    began, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if step % LOG_STEPS == 0:
            seconds = time.monotonic() - began
            print(f"base, step {step}/{steps}  loss {total / LOG_STEPS:.3f}  {seconds:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean loss of a token, in nats, on paragraphs that were not trained on."""
    rows = draw_rows(tokenizer, texts, seed=0)
    batches = [next(rows) for _ in range(HELD_OUT_ROWS // ROWS)]
    return sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches) / len(batches)


def make(packages: Path, out: Path, steps: int, seed: int = 0, threads: int = 2, size: str = DEFAULT) -> dict[str, Any]:
    """Fetch, train, write; returns what ``base.json`` says.  A base of so many steps that is there is not made again.

    Raises:
        CorpusError: a package cannot be had.
        ValueError: there is a base of other steps or another seed.
    """
    if (out / "base.json").is_file():
        facts = json.loads((out / "base.json").read_text(encoding="utf-8"))
        held, asked = (facts.get("size", "5.5M"), facts["steps"], facts["seed"]), (size, steps, seed)
        if held != asked:
            raise ValueError(
                f"{out}: holds a base of size, steps, seed {held}, asked for are {asked}. Give another folder."
            )
        return facts
    versions = corpus.fetch(packages)
    paragraphs = corpus.paragraphs(packages)
    parts = {
        name: [text for own in tasks.of_part(paragraphs, name).values() for text in own] for name in ("base", "eval")
    }
    torch.set_num_threads(threads)
    began = time.monotonic()
    tokenizer = make_tokenizer(parts["base"])
    model = make_model(tokenizer, SIZES[size], seed)
    train(model, draw_rows(tokenizer, parts["base"], seed), steps)
    facts = {
        "packages": versions,
        "paragraphs": {name: len(texts) for name, texts in paragraphs.items()},
        "characters": sum(map(len, parts["base"])),
        "parameters": model.num_parameters(),
        "size": size,
        "steps": steps,
        "tokens": steps * ROWS * ROW_LENGTH,
        "seed": seed,
        "threads": threads,
        "seconds": round(time.monotonic() - began),
        "held_out_loss": held_out_loss(model.eval(), tokenizer, parts["eval"]),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "base.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.rename(out)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=list(SIZES), default=DEFAULT, help="parameters")
    args = parser.parse_args()
    print(json.dumps(make(args.packages, args.out, args.steps, args.seed, args.threads, args.size), indent=1))


if __name__ == "__main__":
    main()
