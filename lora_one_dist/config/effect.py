"""Where a setting has an effect, written beside its type: ``Annotated[float, only_with("optim.name", "x")]``.

A setting that was changed and has no effect is refused (:mod:`checks`), or left out with a note where the command line
made it idle (:mod:`reading`).  Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

PLAIN = re.compile(r"[\w./:\[\]-]+")  # text that needs no quotes in a message


@dataclass(frozen=True)
class Effect:
    """A setting acts where ``test`` says so of the values of other settings, given by their dotted keys."""

    keys: tuple[str, ...]
    test: Callable[..., bool]
    otherwise: str = ""
    """What is wrong where it does not act, and the remedy; '' says which value of the first key is in the way."""

    def fault(self, groups: Mapping[str, Any]) -> str | None:
        """What is wrong, or None.  ``groups``: of a config, by name; without one that the keys need: None."""
        if not all(key.partition(".")[0] in groups for key in self.keys):
            return None
        values = [value_of(groups, key) for key in self.keys]
        if self.test(*values):
            return None
        return self.otherwise or f"has no effect with {self.keys[0]} {shown(values[0])}. Leave it out."


def only_with(key: str, *values: Any, otherwise: str = "") -> Effect:
    """It acts where another setting has one of these values."""
    return Effect((key,), lambda value: value in values, otherwise)


def not_with(key: str, *values: Any, otherwise: str = "") -> Effect:
    """It acts where another setting has none of these values."""
    return Effect((key,), lambda value: value not in values, otherwise)


@dataclass(frozen=True)
class InsteadOf:
    """A setting that takes another one's place: of the two that are not None, the command line's stands."""

    key: str


def value_of(groups: Mapping[str, Any], key: str) -> Any:
    """The value of ``group.name``."""
    group, _, name = key.partition(".")
    return getattr(groups[group], name)


def shown(value: Any) -> str:
    """A value in a message: text as it is, in quotes where its ends could not be seen."""
    return repr(value) if isinstance(value, str) and not PLAIN.fullmatch(value) else str(value)


def idle(groups: Mapping[str, Any]) -> list[tuple[str, Effect, str]]:
    """Settings that differ from their defaults and do not act: key, the effect that they lack, what is wrong.

    At most one entry a setting.
    """
    found = []
    for name, group in groups.items():
        if not isinstance(group, BaseModel):
            continue
        for key, field in type(group).model_fields.items():
            if getattr(group, key) == field.get_default(call_default_factory=True):
                continue
            own = [effect for effect in field.metadata if isinstance(effect, Effect)]
            effects = [*getattr(type(group), "acts", ()), *own]
            lacking = ((effect, effect.fault(groups)) for effect in effects)
            first = next(((effect, fault) for effect, fault in lacking if fault is not None), None)
            if first is not None:
                found.append((f"{name}.{key}", *first))
    return found


def rivals(groups: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of settings of which each stands instead of the other, and both are given."""
    return [
        (effect.key, f"{name}.{key}")
        for name, group in groups.items()
        if isinstance(group, BaseModel)
        for key, field in type(group).model_fields.items()
        for effect in field.metadata
        if isinstance(effect, InsteadOf)
        and getattr(group, key) is not None
        and value_of(groups, effect.key) is not None
    ]
