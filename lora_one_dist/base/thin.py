"""Weights that fill no memory, for a forward pass of a model at its real widths before a weight is read.

In: a model on the meta device.  Out: the same model with values in fp32, a few MB whatever its size.  Not collective.

A large matrix is a window of one random vector v, ``W[i, j] = v[o + i + j]`` (strides 1, 1): random, of full rank, and
valid for any operation.  Products with it are replaced by cheaper ones (:class:`ThinProducts`), which as any product
with a frozen weight take each row by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 2**14  # elements below which a weight has values of its own
SPREAD = 0.02  # of a large weight's values: what models are initialised with
OFFSETS = 8  # at which windows begin: kinds of weights
WIDTH = 61  # rank of a product; prime, so that heads are not copies of each other
SEED = 7


def fill_thinly(model: nn.Module) -> None:
    """Give every parameter and buffer of a model values in fp32 on the CPU, without gradients; tied ones stay tied."""
    generator = torch.Generator().manual_seed(SEED)
    large = [tuple(p.shape) for p in model.parameters() if p.numel() >= SMALL]
    window = torch.randn(max((sum(shape) for shape in large), default=0) + OFFSETS, generator=generator) * SPREAD
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    values = _values(parameter, name, window, len(made) % OFFSETS, generator)
                    made[id(parameter)] = nn.Parameter(values, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                held = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer
                module._buffers[name] = held.float() if held.is_floating_point() else held


def _values(parameter: Any, name: str, window: torch.Tensor, offset: int, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(parameter.shape)
    if not parameter.is_floating_point():
        return torch.zeros(shape, dtype=parameter.dtype)
    if parameter.numel() >= SMALL and len(shape) > 1 and min(shape[-2:]) > 1:
        return window.as_strided(shape, [1] * len(shape), offset)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / max(1, shape[-1]) ** 0.5
    return values * 0.1 + (0.0 if "bias" in name else 1.0)  # a norm's, most often


class ThinProducts(TorchDispatchMode):
    """Within it ``X W`` (T, a) (a, b) of a large W costs T (a + b): X folded to WIDTH columns, mixed, repeated."""

    def __init__(self) -> None:
        super().__init__()
        mixed = torch.randn(OFFSETS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(SEED))
        self.mixing = (mixed + mixed.mT) / (2 * WIDTH) ** 0.5

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and _is_thin(args[1]):
            return self._product(args[0], args[1])
        if func is torch.ops.aten.addmm.default and not kwargs and _is_thin(args[2]):
            return self._product(args[1], args[2]) + args[0]
        if func is torch.ops.aten._grouped_mm.default and _is_thin(args[1]):  # each expert's share of the rows
            return self._product(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        a, b = right.shape[-2:]
        folds = -(-a // WIDTH)
        padded = nn.functional.pad(left, (0, folds * WIDTH - a))
        folded = padded.unflatten(-1, (folds, WIDTH)).sum(-2) / folds**0.5
        mixed = folded @ self.mixing[right.storage_offset() % OFFSETS]
        return mixed.repeat(*[1] * (left.dim() - 1), -(-b // WIDTH))[..., :b].contiguous()


def _is_thin(weight: torch.Tensor) -> bool:
    """A window, a batch of the same one, or of neighbours."""
    return weight.stride()[-2:] == (1, 1) and min(weight.shape[-2:]) > 1 and weight.stride()[:-2] in ((), (0,), (1,))
