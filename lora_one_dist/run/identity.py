"""What makes two starts one run: its settings, layers, base and data, and which of them may change.  Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_one_dist.base.tables import Table
from lora_one_dist.base.targets import Target
from lora_one_dist.config.settings import Config

SAME_DATA = (
    "Give each the same files and the same tokenizer, by copies or a file system that all share; tools/doctor.py "
    "compares packages and code"
)
HOSTS_NAMED = 3  # in an error, of those that have the same


class HostsError(ValueError):
    """Hosts of one job that have not the same base or data under the same names."""


# Settings that a run keeps: to change one is to start another run. Those not listed may change, and the change is
# logged. What `data` and `model.path` mean is compared by content, `lora.target_modules` and the
# patterns by the layers that they name.
KEPT = (
    "model.dtype",
    "lora.r",
    "lora.alpha",
    "lora.use_rslora",
    "lora.kind",
    "lora.new_tokens",
    "lora.modules_to_save",
    "init.method",
    "init.scheme",
    "init.stable_output",
    "init.adapter",
    "init.num_samples",
    "init.average",
    "init.gamma",
    "optim.name",
    "optim.preconditioner",
    "train.mode",
    "train.global_batch_size",
    "train.seed",
)
# Of runs from before there were these settings.
BEFORE = {"init.scheme": "arb2r", "init.stable_output": True, "lora.kind": "lora", "train.mode": "lora"}
LAYERS = ("lora.target_modules", "lora.exclude_modules", "lora.rank_pattern", "lora.alpha_pattern")
# Where things lie, or what is measured: not worth a line when it changes.
UNLOGGED = ("model.path", "data", *LAYERS, "output_dir", "resume", "init")


def identity(
    config: Config, targets: Sequence[Target], base: Any, train: Any, evaluation: Any, tables: Sequence[Table] = ()
) -> dict[str, Any]:
    """What a run is: its settings, layers, and the fingerprints of base, training and evaluation data.  Pure."""
    layers = [[target.name, target.m, target.n, target.r, target.scaling] for target in targets]
    settings = config.model_dump(mode="json")
    # A default that depends on other settings, or changes with a version, is stored as what it was.
    settings["optim"] |= dict(zip(("preconditioner", "damping"), config.preconditioner, strict=True))
    # Through JSON, as it will be read back.
    return json.loads(
        json.dumps(
            {
                "config": settings,
                "targets": layers,
                "base": base,
                "train_data": train,
                "eval_data": evaluation,
                "tables": [[table.name, table.rows, table.trained] for table in tables],
            }
        )
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two runs' identities: what makes them two, and what may change within one.  Pure."""
    refused, changed = [], []
    is_ = flatten(now["config"])
    was = {key: value for key, value in BEFORE.items() if key in is_} | flatten(before["config"])
    for key in sorted(was.keys() | is_.keys()):
        old, new = was.get(key), is_.get(key)
        if old == new:
            continue
        if key in KEPT:
            refused.append(f"{key} is {new}, was {old}")
        elif not any(key == name or key.startswith(f"{name}.") for name in UNLOGGED):
            changed.append(f"{key} is now {new}, was {old}")
    old_layers, new_layers = ({name: (m, n) for name, m, n, *_ in run["targets"]} for run in (before, now))
    if old_layers != new_layers:
        names = sorted(
            name for name in old_layers.keys() | new_layers.keys() if old_layers.get(name) != new_layers.get(name)
        )
        refused.append(
            f"lora.target_modules names {len(new_layers)} layers, were {len(old_layers)}; {names[0]} differs"
        )
    elif not refused:
        refused += _other_pairs(before["targets"], now["targets"])
    if before.get("tables", []) != now.get("tables", []):
        refused.append(f"trained rows (table, rows, trained) are {now.get('tables')}, were {before.get('tables')}")
    for what, key in (("the base", "base"), ("the training data", "train_data")):
        parts = [part for part in now[key] if before[key].get(part) != now[key][part]]
        if parts:
            shown = ", ".join(f"{part} {now[key][part]!s:.12}, was {before[key].get(part)!s:.12}" for part in parts)
            refused.append(f"{what} is another one ({shown})")
    if before["eval_data"] != now["eval_data"]:
        changed.append("the evaluation data is another one: the best checkpoint so far is forgotten")
    return refused, changed


def _other_pairs(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> list[str]:
    """In what rank or scale the first layer that has another one differs; runs of before patterns tell none."""
    old = {name: pair for name, _, _, *pair in before}
    for name, _, _, *pair in now:
        for key, what, was, is_ in zip(LAYERS[2:], ("r", "s"), old[name], pair, strict=False):
            if was != is_:
                return [f"{key}: {what} of {name} is {is_:g}, was {was:g}"]
    return []


def refuse_unlike_hosts(hosts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise HostsError where hosts differ in ``base``, ``train`` or ``evaluation``: who has what.  Pure.

    Args:
        hosts: by name, the fingerprint of each of the three, as :func:`identity` takes them.
    """
    for key, what, remedy in (
        ("base", "model.path", "Copy the model from one host to the others"),
        ("train", "data.train", SAME_DATA),
        ("evaluation", "data.eval", SAME_DATA),
    ):
        alike: dict[str, list[str]] = {}  # hosts by what they have
        for host, held in hosts.items():
            alike.setdefault(json.dumps(held[key]), []).append(host)
        if len(alike) > 1:
            groups = [f"{_named(names)}: {_shown(hosts[names[0]][key])}" for names in alike.values()]
            raise HostsError(f"{what}: must be the same on every host, is {'; '.join(groups)}. {remedy}.")


def _shown(fingerprint: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{part} {value!s:.12}" for part, value in (fingerprint or {}).items()) or "none"


def _named(hosts: Sequence[str]) -> str:
    more = len(hosts) - HOSTS_NAMED
    return ", ".join(hosts[:HOSTS_NAMED]) + (f" and {more} more" if more > 0 else "")


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``.  Pure."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def differences_of_group(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes a layer group kept by an earlier start one of another initialisation.  Pure."""
    refused, _ = differences(before, now)
    if now["config"]["init"]["average"] == "micro_batch":
        sizes = [
            c["init"]["micro_batch_size"] or c["train"]["micro_batch_size"] for c in (before["config"], now["config"])
        ]
        if sizes[0] != sizes[1]:
            refused.append(f"a mean is of micro-batches of {sizes[1]} samples, was of {sizes[0]}")
    return refused
