"""Padded micro-batches with and without an attention mask: the same loss and gradient, and the time of each.

    python tools/bench/padding.py            a Llama shape of 60 M parameters, micro-batches of 4 samples of 50 to 400

Rows are padded on the right and attention is causal, so that no target sees a pad: the product sends no mask
(:mod:`lora_one_dist.base.loss`).  Forward and backward to the embedding's output, in fp32 on a CPU and bf16 on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.base import head
from lora_one_dist.base.products import freeze_products
from lora_one_dist.commands import markdown
from lora_one_dist.data import batches
from tools.bench import harness

MODEL = (512, 1408, 16, 8, 4, 4096)
SIZE, SHORTEST, LONGEST, BATCHES = 4, 50, 400, 4


def micro_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def sample() -> dict[str, Any]:
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        ids = torch.randint(3, MODEL[-1], (length,), generator=generator).tolist()
        return {"input_ids": ids, "labels": ids}

    return [batches.collate([sample() for _ in range(SIZE)], 0) for _ in range(BATCHES)]


def loss_of(model: Any, batch: dict[str, torch.Tensor], masked: bool) -> torch.Tensor:
    """The mean over the batch's targets, by the product's head; with the mask as transformers' users send it."""
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=batches.IGNORE_INDEX).flatten()
    rows = (labels != batches.IGNORE_INDEX).nonzero().squeeze(1)
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    inputs = {name: batch[name].to(harness.device()) for name in names}
    where = rows.to(harness.device())
    loss = head.loss_in_pieces(
        model, inputs | {"use_cache": False}, where, labels.to(where.device)[where], 1 / len(rows)
    )
    assert loss is not None
    return loss


def run(model: Any, data: list[dict[str, torch.Tensor]], masked: bool) -> tuple[float, list[torch.Tensor]]:
    """Mean loss, and the gradient of the embeddings of each micro-batch's tokens."""
    seen: list[torch.Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda layer, given, out: seen.append(out.requires_grad_())
    )
    losses, gradients = [], []
    for batch in data:
        loss = loss_of(model, batch, masked)
        (gradient,) = torch.autograd.grad(loss, seen[-1])
        gradients.append(gradient * batch["attention_mask"].to(gradient.device)[..., None])
        losses.append(float(loss.detach()))
    handle.remove()
    return sum(losses) / len(losses), gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        parameters = harness.make_model(Path(scratch) / "model", MODEL)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        loaded: Any = AutoModelForCausalLM.from_pretrained(Path(scratch) / "model", dtype=dtype)
    model = loaded.to(harness.device()).requires_grad_(False).train()
    freeze_products(model)
    data = micro_batches()
    (loss, gradients), (masked_loss, masked_gradients) = (run(model, data, masked) for masked in (False, True))
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, masked_gradients, strict=True))
    ways = {"no mask": False, "mask": True}
    seconds = harness.alternate(
        {name: partial(harness.timed, partial(run, model, data, masked)) for name, masked in ways.items()},
        arguments.rounds,
    )
    ratio = harness.paired_ratio(seconds["mask"], seconds["no mask"])
    found = {"loss": loss, "loss_apart": abs(loss - masked_loss), "gradient_apart": apart, "times_faster": ratio}
    harness.record(
        "padding", {"parameters": parameters, "seconds": {k: harness.summary(v) for k, v in seconds.items()}, **found}
    )
    medians = {f"{name}, s": harness.summary(values)["median"] for name, values in seconds.items()}
    print(markdown.table([{**medians, **found}]))


if __name__ == "__main__":
    main()
