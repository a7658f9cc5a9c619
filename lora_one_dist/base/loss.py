"""The loss of a batch, as a sum over its target tokens, and what stands around a forward pass that takes it.

In: a model and a collated batch.  Out: a scalar.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_one_dist.base import varlen
from lora_one_dist.base.blocks import has_encoder
from lora_one_dist.base.head import count_rows, cross_entropy, loss_in_pieces, rows_at_once, rows_only
from lora_one_dist.base.two_stacks import decoder_inputs, whole_windows
from lora_one_dist.cluster import comm
from lora_one_dist.data.batches import IGNORE_INDEX


def loss_sum(
    model: Any, batch: Mapping[str, torch.Tensor], weight: float = 1.0, head_is_target: bool = False
) -> torch.Tensor:
    """``weight`` times the summed cross-entropy of a batch's target tokens, fp32 scalar (0 if it has none).

    Collective under stage 3.

    A sum, not transformers' mean: the caller divides by the targets of the whole global batch, so that the loss is
    the same however the batch is split into micro-batches and ranks.

    A decoder gets no attention mask: rows are padded on the right and attention is causal, so that no target sees a
    pad.  A batch with position_ids holds packed rows, whose documents transformers keeps apart (the padding is some of
    its own), its flash attention only within a batch of one row.  An encoder's attention is not causal: it gets the
    mask, and so does the attention to what it gives out.

    Args:
        head_is_target: the output head's own product must run in one piece, for what is hooked to it.
    """
    device, attention = comm.device(), str(model.config._attn_implementation)
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    if has_encoder(model):
        labels = batch["labels"]
        ids, mask = whole_windows(model, batch["input_ids"], batch["attention_mask"])
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_inputs(model, labels)}
    elif attention == varlen.NAME:
        inputs, labels = varlen.one_row(batch, labels)
    else:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        if "position_ids" in batch and attention.startswith("flash"):
            inputs = {name: values.view(1, -1) for name, values in inputs.items()}
    inputs = {name: _to(device, value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    labels = labels.flatten()
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    labels, rows = _to(device, labels[rows]), _to(device, rows)
    given: dict[str, Any] = {**inputs, "use_cache": False}
    if not head_is_target:
        loss = loss_in_pieces(model, given, rows, labels, weight)
        if loss is not None:
            return loss
    with rows_only(model, rows, count_rows(inputs)):
        logits = model(**given).logits.flatten(0, -2)
    if logits.shape[0] != rows.numel():
        logits = logits[rows]
    return _CrossEntropySum.apply(logits, labels, weight)


def _to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


class _CrossEntropySum(torch.autograd.Function):
    """Cross-entropy of logits (k, V) at labels (k,), summed in fp32 and times a weight.

    The logits become their gradient, rounded once to their type.

    At a vocabulary of 128k the logits of 4096 tokens are 1 GB in bf16, and softmax with its gradient by autograd five
    times that.  Here a few rows at a time are in fp32, and each row gives way to its gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        logits = logits.detach()  # written to: autograd has made it and keeps it nowhere
        count = rows_at_once(logits.shape[1], logits.device)
        for rows, wanted in zip(logits.split(count), labels.split(count), strict=True):
            loss, gradient = cross_entropy(rows.float(), wanted, weight, ctx.needs_input_grad[0])
            total += loss
            if ctx.needs_input_grad[0]:
                rows.copy_(gradient)
        ctx.save_for_backward(logits)
        return total * weight

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output[0]), None, None  # by 1, where the loss itself is differentiated


@contextlib.contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects, while the block runs, the name of the first layer whose output is not finite: none or one."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    leaves = [(name, layer) for name, layer in model.named_modules() if not any(True for _ in layer.children())]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
