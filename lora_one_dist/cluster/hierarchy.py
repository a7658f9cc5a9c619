"""The traffic of adapters: inside the host first, then between the ranks at the same place of their hosts.

Of S bytes each host sends S (H - 1) / H to the others and receives as much, on H hosts with L ranks each, where a ring
over all W = H L ranks sends S (W - 1) / W.  The order of the sums is fixed (a balanced tree over the ranks): the same
ranks give the same bits on one host or many, as long as L is a power of two.  Collective unless a docstring says
otherwise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lora_one_dist.cluster import comm

EXCHANGE_BYTES = 64 * 2**20  # of a reduce-scatter sent at a time: bounds what is received beside the whole


def slot() -> int:
    """This rank's place in flat tensors of :func:`reduce_scatter` and :func:`all_gather`.  Not collective.

    Ranks at the same place of their hosts lie side by side, so that what a host keeps for itself is contiguous.
    """
    topology = comm.here()
    return topology.inner.index(comm.rank()) * len(topology.outer) + topology.outer.index(comm.rank())


def reduce_scatter(send: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of the share at this rank's slot.  send (world_size * share,) -> (share,), a copy.

    Inside the host first, then between the ranks at the same place of their hosts.  Sums are in a fixed order.
    """
    topology = comm.here()
    own = _exchange_and_sum(_exchange_and_sum(send, topology.inner), topology.outer)
    return own.clone() if own is send else own


def _exchange_and_sum(send: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Sum over ``ranks`` of this rank's part of ``send``.  (len(ranks) * part,) -> (part,)."""
    if len(ranks) == 1:
        return send
    parts = send.view(len(ranks), -1)
    own = torch.empty_like(parts[0])
    step = max(1, EXCHANGE_BYTES // (len(ranks) * send.element_size()))
    for columns, result in zip(parts.split(step, dim=1), own.split(step), strict=True):
        received = torch.empty_like(columns, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, columns.contiguous(), group=comm.group(ranks))
        result.copy_(tree_sum(received))
    return own


def tree_sum(rows: torch.Tensor) -> torch.Tensor:
    """Sum of (k, n) over its rows, neighbours first: (0 + 1) + (2 + 3).  Pure; the order depends on k alone."""
    while len(rows) > 1:
        paired = rows[: len(rows) // 2 * 2]
        rows = torch.cat([paired[0::2] + paired[1::2], rows[len(paired) :]])
    return rows[0]


def all_gather(receive: torch.Tensor, own: torch.Tensor) -> None:
    """Fill ``receive`` (world_size * share,), by slot, with each rank's ``own`` (share,).  Between the hosts first."""
    topology = comm.here()
    if len(topology.inner) == 1:
        _all_gather(receive, own, topology.outer)
        return
    of_place = own
    if len(topology.outer) > 1:
        of_place = torch.empty(len(topology.outer) * own.numel(), dtype=own.dtype, device=own.device)
        _all_gather(of_place, own, topology.outer)
    _all_gather(receive, of_place, topology.inner)


def _all_gather(receive: torch.Tensor, own: torch.Tensor, ranks: tuple[int, ...]) -> None:
    dist.all_gather_into_tensor(receive, own, group=comm.group(ranks))
