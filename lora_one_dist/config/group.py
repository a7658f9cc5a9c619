"""What every group of settings is: frozen, without unknown keys, each described by the text below it."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from lora_one_dist.config.paths import PathError, expanded


class Group(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    acts: ClassVar[tuple[Any, ...]] = ()
    """Effects (:mod:`effect`) that every setting of the group has, before its own."""


def _expanded(given: str | list[str] | None) -> str | list[str] | None:
    try:
        if isinstance(given, list):
            return [expanded(path) for path in given]
        return None if given is None else expanded(given)
    except PathError as error:
        raise PydanticCustomError("path", "{fault}", {"fault": str(error)}) from error


AsPath = AfterValidator(_expanded)  # of a setting that is a path, several, or another name
