"""Live tensor bytes of a process, counted storage by storage, and its peak."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts every storage that an operation returns until it is freed.  ``live`` and ``peak`` in bytes."""

    def __init__(self, existing: list[torch.Tensor] | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, Any] = {}
        for tensor in existing or []:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or size == 0:
            return

        def freed(_: object) -> None:
            self.live -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def host_bytes(field: str = "VmHWM") -> int:
    """A field of /proc/self/status: VmHWM is the peak of resident memory, VmRSS what is resident now."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def reset_host_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
