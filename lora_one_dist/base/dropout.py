"""Dropout of a base, which a gradient that is computed once, or twice, must not have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Train mode (gradient checkpointing needs it) with every dropout probability of the base at 0."""
    saved: list[tuple[Any, str, float]] = []
    for holder in (*model.modules(), getattr(model, "config", None)):  # some forwards read it from the config
        for key, value in vars(holder).items() if holder is not None else ():
            is_probability = "dropout" in key or (key == "p" and isinstance(holder, nn.Dropout))
            if is_probability and isinstance(value, float) and value > 0:
                saved.append((holder, key, value))
    was_training = model.training
    model.train()
    for holder, key, _ in saved:
        setattr(holder, key, 0.0)
    try:
        yield
    finally:
        model.train(was_training)
        for holder, key, value in saved:
            setattr(holder, key, value)
