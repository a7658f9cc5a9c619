"""AdamW or SGD on trained tables of embeddings, sharded by rows over all ranks.

In: tables (the same on every rank), their gradients as backward makes them.  Out: the updated tables on every rank.  A
part of the optimizer of the adapters, which counts the steps and clips by the norm over both.  Each rank owns as many
successive rows of each table, with their fp32 masters and moments; as a row has no partner, there is no preconditioner.
The rate is that of lora_A, and weight decay the adapters': one rule for all that is trained, as in PEFT under torch's
AdamW.

One step, all ranks together, table by table: backward adds to one fp32 send buffer; ``reduce_scatter`` brings each
owner the sum of its rows; the owner takes the step; ``all_gather`` brings the working copies to every rank.

Bytes per rank, k rows of width h on R ranks: 4 k h send buffer, e k h working copy, and 16 k h / R of gradient, masters
and moments (AdamW).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lora_one_dist.adapters.tables import TrainedTable
from lora_one_dist.cluster import comm, hierarchy
from lora_one_dist.config.optim import OptimConfig
from lora_one_dist.initialise import spectral
from lora_one_dist.train.updates import adamw_, move_to_main_grad, sgd_

CHUNK = 2**22  # elements updated at once: AdamW's denominator is as large
KINDS = ("master", "exp_avg", "exp_avg_sq")  # as torch's AdamW calls them; SGD has the first
# Of what a rank owns of a table, by rows, or of a flat parameter, by elements.
PART = re.compile(r"(?P<table>.+)\.(?:rows|elements)(?P<first>\d+)-(?P<end>\d+)\.(?P<kind>\w+)")


class _Rows:
    """One table, and this rank's part of it."""

    def __init__(self, table: TrainedTable, adamw: bool):
        self.name, self.parameter = table.plan.name, table.weight
        parameter: Any = table.weight
        count, width = parameter.shape
        each = -(-count // comm.world_size())
        self.working = torch.zeros(comm.world_size() * each, width, dtype=parameter.dtype, device=parameter.device)
        self.working[:count] = parameter.detach()
        self.send = torch.zeros_like(self.working, dtype=torch.float32)
        parameter.data, parameter.main_grad = self.working[:count], self.send[:count]
        parameter.grad_added_to_main_grad = False
        parameter.requires_grad_()
        parameter.register_post_accumulate_grad_hook(move_to_main_grad)
        first = hierarchy.slot() * each
        self.own_working = self.working[first : first + each]
        self.first, self.end = min(first, count), min(first + each, count)
        self.masters = self.own_working.float()
        self.moments = [torch.zeros_like(self.masters) for _ in range(2 if adamw else 0)]
        self.at_once = max(1, CHUNK // width)
        self.grads: torch.Tensor | None = None

    def update(self, steps: int, lr: float, clip: float, config: OptimConfig) -> None:
        grads, self.grads = self.grads, None
        assert grads is not None, "reduce comes first"
        grads.mul_(clip)
        kinds = [kind.split(self.at_once) for kind in (self.masters, *self.moments)]
        for master, grad, *moments in zip(kinds[0], grads.split(self.at_once), *kinds[1:], strict=True):
            if moments:
                first, second = moments
                rates = lr, config.betas, config.eps, config.weight_decay
                adamw_(master, grad, first, second, steps, *rates)
            else:
                sgd_(master, grad, lr, config.weight_decay)
        self.share()
        parameter: Any = self.parameter
        parameter.grad_added_to_main_grad = False

    def share(self) -> None:
        self.own_working.copy_(self.masters)
        hierarchy.all_gather(self.working.view(-1), self.own_working.reshape(-1).clone())


class RowShardedTables:
    """The tables of one run; each method but those that only look is collective, where there are any."""

    def __init__(self, tables: Sequence[TrainedTable], config: OptimConfig):
        self.config = config
        self.tables = [_Rows(table, config.name == "adamw") for table in tables]

    def reduce(self) -> float:
        """Sum the gradients of all ranks at their owners; the squared norm of this rank's."""
        square = 0.0
        for table in self.tables:
            table.grads = hierarchy.reduce_scatter(table.send.view(-1)).view_as(table.own_working)
            table.send.zero_()
            square += spectral.frobenius_norm(table.grads) ** 2
        return square

    def update(self, steps: int, lr: float, clip: float) -> None:
        """Step number ``steps``, counted from 1, with gradients times ``clip``."""
        for table in self.tables:
            table.update(steps, lr, clip, self.config)

    def share(self) -> None:
        """The working copies of all owners' masters to every rank."""
        for table in self.tables:
            table.share()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's masters and moments by table, rows and kind, as views."""
        return {
            f"{table.name}.rows{table.first}-{table.end}.{kind}": tensor[: table.end - table.first]
            for table in self.tables
            if table.first < table.end
            for kind, tensor in zip(KINDS, (table.masters, *table.moments), strict=False)
        }

    def without_gradient(self) -> list[str]:
        """Names of those that backward did not reach since the last step."""
        parameters: list[tuple[str, Any]] = [(table.name, table.parameter) for table in self.tables]
        return [name for name, parameter in parameters if not parameter.grad_added_to_main_grad]

    def non_finite(self) -> list[str]:
        """Names of those whose summed gradient of this rank's rows is not finite."""
        return [t.name for t in self.tables if t.grads is not None and not bool(t.grads.isfinite().all())]

    def take_non_finite(self) -> list[str]:
        """Names of those whose own gradient so far is not finite; forgets all so far."""
        named = [table.name for table in self.tables if not bool(table.send.isfinite().all())]
        for table in self.tables:
            table.send.zero_()
        return named


class Places:
    """Where a tensor of some rank's :meth:`state` goes in another's: by its name; of parts, by what both have."""

    def __init__(self, wanted: Mapping[str, torch.Tensor]):
        self.wanted = wanted
        self.parts: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        """By table and kind: the first row, or element, the end, and the name."""
        for name in wanted:
            if (own := PART.fullmatch(name)) is not None:
                found = (int(own["first"]), int(own["end"]), name)
                self.parts.setdefault((own["table"], own["kind"]), []).append(found)

    def of(self, saved: str) -> Iterator[tuple[str, torch.Tensor, slice]]:
        """Yields the name in ``wanted``, the part of that tensor, and which rows of the saved one it takes."""
        of = PART.fullmatch(saved)
        if of is None:
            if saved in self.wanted:
                yield saved, self.wanted[saved], slice(None)
            return
        c, d = int(of["first"]), int(of["end"])
        for a, b, name in self.parts.get((of["table"], of["kind"]), []):
            first, end = max(a, c), min(b, d)
            if first < end:
                yield name, self.wanted[name][first - a : end - a], slice(first - c, end - c)
