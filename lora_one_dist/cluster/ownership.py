"""Which rank owns which layer: pure, the same answer on every rank.

The work per layer (gradient, SVD, preconditioner, moments) belongs to one rank.  The two phases cost differently
(m n for gradient and SVD, r (m + n) for the optimizer), so each makes its own map.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(costs: Sequence[float], world_size: int) -> list[int]:
    """Owner of each item: the costliest first, each to the rank that has least so far.

    No rank has more than the mean plus one item's cost (Graham, 1969: at most 4/3 of the optimum).
    """
    load = [(0.0, rank) for rank in range(world_size)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, rank = heapq.heappop(load)
        owners[item] = rank
        heapq.heappush(load, (cost + costs[item], rank))
    return owners


def split(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Cut items, in order, into at most ``groups`` runs of near-equal cost; no run is empty."""
    total = sum(costs)
    runs: list[list[int]] = [[] for _ in range(groups)]
    before = 0.0
    for item, cost in enumerate(costs):
        runs[min(groups - 1, int(groups * (before + cost / 2) / total))].append(item)
        before += cost
    return [run for run in runs if run]
