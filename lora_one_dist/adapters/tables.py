"""Trained rows of the embedding and the output head: plain tensors outside ZeRO, beside or in place of the base's.

In: a loaded base, its planned tables.  Out: a :class:`TrainedTable` for each, the same bits on every rank.  Rows of new
tokens stand beside the base's table, which stays where ZeRO has it:

- embedding  ids that are new look up row 0 of the base, and their output is replaced by their own row
- head       logits of new tokens take the places of the base's, or come behind them

A whole table takes the base's place, and is never gathered.  Bytes per rank: e k h working copy (e bytes an element, k
rows), while it starts the base's table beside it; the rest is :mod:`lora_one_dist.train.rows`.  Gradients are added to
their fp32 sums as they come, row by row: autograd's own would be a table each, in the table's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_one_dist.base.head import RowsHead, WholeHead
from lora_one_dist.base.sharding import Base, mean_row
from lora_one_dist.base.tables import Table
from lora_one_dist.cluster import comm


@dataclass(frozen=True)
class TrainedTable:
    """A table's trained rows as the model holds them: ``weight`` (k, h), frozen until an optimizer has it."""

    plan: Table
    weight: nn.Parameter


def put_tables(base: Base, tables: Sequence[Table]) -> list[TrainedTable]:
    """Give each planned table its rows: the base's, new ones the mean of the old.  Collective."""
    return [_put_whole(base, table) if table.whole else _put_rows(base, table) for table in tables]


def set_rows(tables: Sequence[TrainedTable], given: Mapping[str, torch.Tensor]) -> None:
    """Let the tables that are ``given``, by name, have those rows instead.  Not collective."""
    for table in tables:
        if table.plan.name in given:
            table.weight.detach().copy_(given[table.plan.name])


def _new_row(base: Base, weight: Any, table: Table) -> torch.Tensor | None:
    """Where new tokens start, in the table's type.  Collective."""
    if not table.new:
        return None
    return mean_row(base, weight, min(table.old, table.new[0]), table.width).to(comm.device(), weight.dtype)


def _put_rows(base: Base, table: Table) -> TrainedTable:
    modules: list[Any] = [base.module.get_submodule(name) for name in table.modules]
    start = _new_row(base, modules[0].weight, table)
    assert start is not None, f"{table.name}: no row is trained"
    weight = nn.Parameter(start.repeat(table.trained, 1), requires_grad=False)
    for module in modules:
        if isinstance(module, nn.Embedding):
            _replace_looked_up(module, weight, table)
        else:
            RowsHead.put(module, weight, table.new, table.old, table.rows)
    return TrainedTable(table, weight)


def _put_whole(base: Base, table: Table) -> TrainedTable:
    modules: list[Any] = [base.module.get_submodule(name) for name in table.modules]
    given = modules[0].weight
    start = _new_row(base, given, table)
    whole = torch.empty(table.rows, table.width, dtype=given.dtype, device=comm.device())
    with base.gathered([given]):
        whole[: table.old].copy_(given.detach())
    if start is not None:
        whole[list(table.new)] = start
    weight = nn.Parameter(whole, requires_grad=False)
    base.forget(given)
    for module in modules:
        module.weight = weight
        if isinstance(module, nn.Embedding):
            module.num_embeddings, module.__class__ = table.rows, WholeEmbedding
        else:
            module.out_features, module.__class__ = table.rows, WholeHead
    return TrainedTable(table, weight)


def _replace_looked_up(embedding: Any, weight: nn.Parameter, table: Table) -> None:
    """By hooks, not in its forward: its output, on which ZeRO would gather it again in backward, needs no gradient."""
    place = torch.full((table.rows,), -1, device=comm.device())
    place[list(table.new)] = torch.arange(table.trained, device=comm.device())
    places: list[torch.Tensor] = []

    def before(layer: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        places.append(place[given[0]])
        return (given[0].masked_fill(places[-1] >= 0, 0), *given[1:])

    def behind(layer: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return _Replace.apply(output, weight, places.pop(), _factor(layer, weight))

    embedding.register_forward_pre_hook(before, prepend=True)
    embedding.register_forward_hook(behind)


class _Replace(torch.autograd.Function):
    """Looked-up states (..., h) with those of trained tokens in their places; ``places`` (...) has -1 for others."""

    @staticmethod
    def forward(
        ctx: Any, looked_up: torch.Tensor, weight: Any, places: torch.Tensor, scale: torch.Tensor | float
    ) -> torch.Tensor:
        ctx.weight, ctx.scale, ctx.places = weight, scale, places
        return torch.where((places >= 0)[..., None], weight[places.clamp(min=0)] * scale, looked_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained = ctx.places >= 0
        if ctx.needs_input_grad[1]:
            _add_rows(ctx.weight, ctx.places[trained], grads[0][trained], ctx.scale)
        return grads[0].masked_fill(trained[..., None], 0) if ctx.needs_input_grad[0] else None, None, None, None


class WholeEmbedding(nn.Embedding):
    """An embedding that is trained: the gradients of its rows go straight into its ``main_grad``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _LookUp.apply(input, self.weight, _factor(self, self.weight), self.padding_idx)


class _LookUp(torch.autograd.Function):
    """Rows (..., h) of tokens (...), times a factor; the padding's get no gradient, as of autograd's own."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: Any, scale: torch.Tensor | float, padding: int | None
    ) -> torch.Tensor:
        ctx.weight, ctx.scale, ctx.tokens, ctx.padding = weight, scale, tokens, padding
        return nn.functional.embedding(tokens, weight) * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        change, tokens = grads[0].flatten(0, -2), ctx.tokens.flatten()
        if ctx.padding is not None:
            change = change.masked_fill((tokens == ctx.padding)[:, None], 0)
        _add_rows(ctx.weight, tokens, change, ctx.scale)
        return None, None, None, None


def _add_rows(weight: Any, places: torch.Tensor, change: torch.Tensor, scale: torch.Tensor | float) -> None:
    """To the weight's ``main_grad``: gradients (k, h) of rows at ``places`` (k,) that were looked up, with a factor."""
    change = change.float() * scale
    if change.is_cuda:  # sorts, and so adds in one order; on a CPU it adds in any
        weight.main_grad.index_put_((places,), change, accumulate=True)
    else:
        weight.main_grad.index_add_(0, places, change)
    weight.grad_added_to_main_grad = True


def _factor(embedding: Any, weight: torch.Tensor) -> torch.Tensor | float:
    """What transformers' embeddings multiply their rows by: of a tensor, as rounded to the rows' type."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(weight.dtype) if isinstance(scale, torch.Tensor) else scale
