"""What a row of the battery gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class Skip(Exception):  # noqa: N818 (no error)
    """Why a row cannot be run here."""


@dataclass(frozen=True)
class Figure:
    """Did it hold, what was found, what should be."""

    ok: bool
    text: str
    expected: str
    numbers: Mapping[str, object] = field(default_factory=dict)
