"""Which linear layers a pass over text runs, and its logits need, found by one without values, or with next to none.

In: a skeleton, or any model.  Out: by layer how often it is called, and what cannot be adapted.  Pure: the pass is over
a copy.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from lora_one_dist.base.blocks import has_encoder
from lora_one_dist.base.dropout import dropout_off
from lora_one_dist.base.graph import begin_at_embeddings, followed
from lora_one_dist.base.thin import ThinProducts, fill_thinly

TOKENS = 8


@dataclass
class Pass:
    """What one forward pass in train mode did, and the backward pass behind it."""

    calls: dict[str, int] = field(default_factory=dict)
    """Of every linear layer, by name; 0: it reads another input, or another module takes its weight."""
    no_tensor: set[str] = field(default_factory=set)
    """Layers whose output is no tensor but a tuple of several."""
    in_logits: set[str] = field(default_factory=set)
    """Layers that the logits depend on; all, where backward does not run without values."""


def run(model: Any) -> Pass | None:
    """The pass, or None where the model does not run without values, or is partitioned.

    First as it is; models that ask for values in between, or whose experts' product is for bf16 alone, run under
    torch's fake tensors, in bf16; models whose shapes hang on values run with thin ones (:mod:`thin`).
    """
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return None
    for attempt in (_with_a_cache, _faked, _thinly):
        found = Pass()
        try:
            watched = _watched(model, found)
            with dropout_off(watched):
                attempt(watched, found)
        except Exception:  # each model has its own way to need a value
            continue
        return found
    return None


def _watched(model: Any, found: Pass) -> Any:
    """A copy of the model on the meta device that writes its linear layers' calls into ``found``."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    watched = copy.deepcopy(model, memo)
    if getattr(watched.config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        watched.set_attn_implementation("eager")  # kernels need values

    def count(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
            found.calls[name] += 1
            if not isinstance(output, torch.Tensor):
                found.no_tensor.add(name)
            elif output.requires_grad:
                output = followed(output)
                output.register_hook(lambda gradient: found.in_logits.add(name))
            return output

        return hook

    for name, layer in watched.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            found.calls[name] = 0
            layer.register_forward_hook(count(name))
    begin_at_embeddings(watched)
    return watched


def _ids() -> torch.Tensor:
    return torch.zeros(1, TOKENS, dtype=torch.long, device="meta")


def _run(model: Any, ids: torch.Tensor, found: Pass, **given: Any) -> None:
    """Forward and back, of two stacks each on the ids."""
    if has_encoder(model):
        given = {"decoder_input_ids": ids}
    _back(model(input_ids=ids, **given, use_cache=False).logits, found)


def _with_a_cache(model: Any, found: Pass) -> None:
    """With an empty cache transformers does not ask the positions whether they are of a packed row."""
    _run(model, _ids(), found, past_key_values=DynamicCache(config=model.config))


def _faked(model: Any, found: Pass) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _run(model.to(torch.bfloat16), mode.from_tensor(_ids()), found)


def _thinly(model: Any, found: Pass) -> None:
    fill_thinly(model)
    with ThinProducts(), torch.random.fork_rng(devices=[]):
        _run(model, torch.arange(TOKENS)[None], found)


def _back(logits: torch.Tensor, found: Pass) -> None:
    try:
        logits.sum().backward()
    except Exception:  # as of a forward pass
        found.in_logits = set(found.calls)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of what it cannot fake."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
