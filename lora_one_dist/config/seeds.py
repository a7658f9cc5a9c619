"""Seeds from one number and a purpose: who draws for what never depends on who drew before.  Pure."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """A seed below 2^56 from (seed, purpose, name): the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
