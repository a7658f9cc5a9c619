"""One adapter of Megatron-Bridge's: which of PEFT's layers it serves, how theirs are put into it, and taken out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_one_dist.adapters.peft_format import Layer
from lora_one_dist.convert import megatron
from lora_one_dist.convert.megatron import Geometry
from lora_one_dist.disk.lazy import LazyTensor

# Each linear layer of Megatron's, and of its parts: Bridge's adapter, its name in target_modules, PEFT's layer.
MODULES = {
    "self_attention.linear_qkv": [
        ("adapter_q", "linear_q", "self_attn.q_proj"),
        ("adapter_k", "linear_k", "self_attn.k_proj"),
        ("adapter_v", "linear_v", "self_attn.v_proj"),
    ],
    "self_attention.linear_proj": [("", "linear_proj", "self_attn.o_proj")],
    "mlp.linear_fc1": [
        ("adapter_gate", "linear_fc1_gate", "mlp.gate_proj"),
        ("adapter_up", "linear_fc1_up", "mlp.up_proj"),
    ],
    "mlp.linear_fc2": [("", "linear_fc2", "mlp.down_proj")],
}


class Blocks:
    """The adapters of some of PEFT's layers as one of Bridge's: A on A, B along a diagonal, or beside each other."""

    def __init__(self, layers: Sequence[Layer | None], names: Sequence[str], shape: Geometry, scale: float):
        self.layers, self.scale, self.groups = layers, scale, groups_of(shape, names)
        self.sizes = [size_of(shape, name) for name in names]
        ranks = [layer.r if layer else 0 for layer in layers]
        self.shared = len(layers) > 1 and _share_a(layers)
        self.offsets = [0 if self.shared else sum(ranks[:i]) for i in range(len(ranks))]
        self.rank = max(offset + r for offset, r in zip(self.offsets, ranks, strict=True))
        self.is_diagonal = self.rank > max(ranks)

    def tensors(self, rank: int, dtype: torch.dtype, tp: int) -> tuple[LazyTensor, LazyTensor]:
        rows = sum(out for out, _ in self.sizes)
        A = LazyTensor(dtype, (rank, self.sizes[0][1]), lambda: self.stacked(rank, dtype))
        return A, LazyTensor(dtype, (rows, rank), lambda: permute_halves(self.joined(rank, dtype), tp))

    def stacked(self, rank: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.zeros(rank, self.sizes[0][1], dtype=dtype)
        for layer, offset in zip(self.layers, self.offsets, strict=True):
            if layer:
                made[offset : offset + layer.r] = layer.A.read()
        return made

    def joined(self, rank: int, dtype: torch.dtype) -> torch.Tensor:
        parts = []
        for layer, offset, (rows, _) in zip(self.layers, self.offsets, self.sizes, strict=True):
            part = torch.zeros(rows, rank, dtype=dtype)
            if layer:
                values = layer.B.read()
                factor = layer.scale / self.scale
                part[:, offset : offset + layer.r] = values if factor == 1 else values.double() * factor
            parts.append(part)
        return megatron.join(parts, self.groups)


def _share_a(layers: Sequence[Layer | None]) -> bool:
    """Have all these layers the same A and the same scale?"""
    first, *others = layers
    return first is not None and all(
        other is not None
        and (other.scale, other.A.shape) == (first.scale, first.A.shape)
        and torch.equal(other.A.read(), first.A.read())
        for other in others
    )


def permute_halves(B: torch.Tensor, tp: int) -> torch.Tensor:
    """Rows of B as Bridge stores those of ``adapter_gate`` and ``adapter_up``: each rank's first half, then each's
    second, as if every one of the two held gate and up.  Pure; :func:`restore_halves` is its inverse.
    """
    return B.view(tp, 2, -1, B.shape[1]).transpose(0, 1).reshape(B.shape) if tp > 1 else B


def restore_halves(B: torch.Tensor, tp: int) -> torch.Tensor:
    """Undo :func:`permute_halves`."""
    return B.view(2, tp, -1, B.shape[1]).transpose(0, 1).reshape(B.shape) if tp > 1 else B


def size_of(shape: Geometry, name: str) -> tuple[int, int]:
    """Rows and columns of a layer of the base."""
    q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    return {
        "self_attn.q_proj": (q, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }[name]


def groups_of(shape: Geometry, names: Sequence[str]) -> int:
    """Of rows that take turns in a fused B: as :func:`megatron.join` takes them."""
    return shape.groups if len(names) == len(megatron.QKV) else 1


def cut(name: str, tp: int) -> tuple[int, int]:
    """Axis and number of pieces, as tensor-parallel ranks hold an adapter."""
    if name.endswith("linear_in.weight"):
        return (1 if ".linear_proj." in name or ".linear_fc2." in name else 0), tp
    return 0, 2 * tp if ".linear_fc1." in name else tp


def has_part(module: str, part: str) -> bool:
    """Has Bridge such an adapter on this layer: one of its parts, or one for all?"""
    return part == "" or part in [adapter for adapter, _, _ in MODULES[module]]


class Split:
    """One of Bridge's adapters as PEFT's: for each part its rows of B, and of the rank what it uses."""

    def __init__(self, A: LazyTensor, B: LazyTensor, rows: Sequence[int], groups: int, tp: int):
        self.A, self.B, self.tp, self.groups = A, B, tp, groups
        self.counts = [count // groups for count in rows]
        used_A, whole = A.read().any(1), restore_halves(B.read(), tp)
        used_B = torch.stack([self._rows(whole, i).reshape(-1, A.shape[0]).any(0) for i in range(len(rows))])
        # Where only a sibling's B is not zero, the rank is the sibling's: a block of a diagonal.
        self.kept = [(used | (used_A & ~used_B.any(0))).nonzero().flatten() for used in used_B]

    def _rows(self, B: torch.Tensor, index: int) -> torch.Tensor:
        return megatron.take(B, self.groups, self.counts, index)

    def parts(self) -> list[tuple[LazyTensor, LazyTensor]]:
        return [self._part(i, kept) for i, kept in enumerate(self.kept)]

    def _part(self, index: int, kept: torch.Tensor) -> tuple[LazyTensor, LazyTensor]:
        rows, rank = self.groups * self.counts[index], len(kept)

        def read_rows() -> torch.Tensor:
            part = self._rows(restore_halves(self.B.read(), self.tp), index)
            return part.reshape(rows, -1)[:, kept].contiguous()

        A = LazyTensor(self.A.dtype, (rank, self.A.shape[1]), lambda: self.A.read()[kept])
        return A, LazyTensor(self.B.dtype, (rows, rank), read_rows)
