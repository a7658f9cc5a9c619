"""Checkpoints: all that a run needs to go on, at any number of ranks.

In: adapters, or every weight, and optimizer, in whatever layout the ranks have.  Out, and back in::

    checkpoints/
      latest                                name of the newest
      best.json                             step and eval loss of the best
      step-40/
        adapter/                            PEFT folder, loads on the untouched base; or model/, if every weight trains
        optimizer-00000-of-00002.safetensors  fp32 masters and moments of the layers that a rank owned, by name
        state.json                          step, data position, schedule, seed, config, fingerprints, versions
        manifest.json                       size and hash of every file
      init-1-of-4/                          initial pairs of a layer group, until step 0 is saved

A frozen base is never written.  Random numbers are functions of (seed, purpose, step, rank), and the order of the
data of (seed, step), so that the seed and the step are their whole state.  Every rank writes what it owns, at once:
``(4 + 8) P / world_size`` bytes with AdamW for P adapter parameters, and rank 0 the adapter, ``w P`` bytes (w bytes an
element; ``8 P`` where the method changed the base).  The same number of bytes is held for a moment in host memory.
Where every weight is trained P is the model's, each rank writes a part of the model too, ``w P / world_size``, and of
masters and moments one tensor at a time is in host memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as encode_tensors

from lora_one_dist.adapters import folder as adapters
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import CheckpointConfig, Config
from lora_one_dist.disk import folders
from lora_one_dist.initialise.pairs import Initialisation
from lora_one_dist.run.identity import differences, differences_of_group
from lora_one_dist.train.loop import Optimizer
from lora_one_dist.train.rows import Places

FORMAT = 1
STATE = "state.json"
STEP = re.compile(r"step-(\d+)")
RUN = "run.json"  # of the run folder: what makes it one
LOCK = ".lock"  # held while a job writes there


class CheckpointError(ValueError):
    """A checkpoint or run folder that this run cannot go on from: value, rule, remedy."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint of this run."""

    folder: Path
    step: int
    state: dict[str, Any]


def refuse_used_folder(root: Path, resume: str) -> None:
    """Raise CheckpointError if the folder holds anything but a run to go on with.  Not collective."""
    place = existing(root)
    if place != root and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise CheckpointError(f"output_dir = {root}: {place} is no folder to write to. Give another path.")
    if place != root:
        return
    remedy = "Give another folder, or remove this one."
    if not root.is_dir():
        raise CheckpointError(f"output_dir = {root}: is not a folder. Give another path.")
    if all(path.name == LOCK or path.match(".*.partial") for path in root.iterdir()):
        return  # a start that failed before it wrote anything
    if not (root / RUN).is_file():
        raise CheckpointError(f"output_dir = {root}: exists and is not empty, and holds no run. {remedy}")
    read_run(root)
    if resume == "never":
        raise CheckpointError(f"output_dir = {root}: holds a run, and resume is never. {remedy}")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def read_run(root: Path) -> dict[str, Any] | None:
    """What the last start of the run in this folder has written of itself; None in a new folder.  Not collective."""
    path = root / RUN
    if not path.is_file():
        return None
    try:
        run = dict(json.loads(path.read_text(encoding="utf-8")))
        run["identity"]["config"], run["identity"]["targets"]  # what it is read for
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}). Give another output_dir, and a checkpoint as resume."
        ) from error
    return run


def find(root: Path, resume: str, own: Mapping[str, Any]) -> tuple[Found | None, list[str]]:
    """The checkpoint to go on from, None to start anew, and lines to tell the user.  Collective.

    The newest whole one of the run's own folder; if it has none at all, the one that ``resume`` names.

    Args:
        root: the run folder.
        own: this run's :func:`identity`.

    Raises:
        RankError, CheckpointError: on all ranks: it is another run's; or none is whole; or the one named is not.
    """
    newest_first = comm.all_gather_object(saved_steps(root / "checkpoints"))[0]
    named = Path(resume) if resume not in ("auto", "never") else None
    within = named is not None and named.resolve().parent == (root / "checkpoints").resolve()
    if named is not None and within and newest_first and named.name != newest_first[0]:
        raise CheckpointError(
            f"resume = {resume}: the run has gone on to {newest_first[0]} since. To branch off there give another "
            "output_dir; to go on, resume: auto."
        )
    notes: list[str] = []
    for name in newest_first:
        state, fault = _read(root / "checkpoints" / name)
        if fault is None:
            return _accept(root / "checkpoints" / name, state, own, notes)
        notes.append(f"{name} is skipped: {fault}")
    if newest_first:
        listed = "; ".join(notes)
        raise CheckpointError(
            f"output_dir = {root}: no checkpoint is whole: {listed}. Mend one, or start over in another output_dir."
        )
    if named is not None:
        state, fault = _read(named)
        if fault is not None:
            raise CheckpointError(f"resume = {resume}: {fault}. Give another checkpoint, or resume: auto.")
        return _accept(named, state, own, notes)
    with comm.all_or_none("checking the output folder"):
        if comm.rank() == 0:
            _refuse_other_run(root, own)
    return None, notes


def saved_steps(checkpoints: Path) -> list[str]:
    """Names of the checkpoints there, newest first."""
    if not checkpoints.is_dir():
        return []
    names = [path.name for path in checkpoints.iterdir() if STEP.fullmatch(path.name)]
    return sorted(names, key=_step_of, reverse=True)


def _step_of(name: str) -> int:
    found = STEP.fullmatch(name)
    assert found is not None, f"{name} is no checkpoint's name"
    return int(found.group(1))


def _read(folder: Path) -> tuple[dict[str, Any], str | None]:
    """State of a checkpoint, and what is wrong with it or None.  Collective."""

    def judge(state: dict[str, Any]) -> str | None:
        if state.get("format") != FORMAT:
            return f"{folder / STATE} has format {state.get('format')}, this version reads {FORMAT}"
        if "step" not in state:
            return f"{folder} is no checkpoint but a part of an initialisation"
        if STEP.fullmatch(folder.name) and state["step"] != _step_of(folder.name):
            return f"{folder / STATE} holds step {state['step']}: the folder was renamed, or is another one's"
        return None

    return _read_state(folder, judge)


def _read_state(folder: Path, judge: Callable[[dict[str, Any]], str | None]) -> tuple[dict[str, Any], str | None]:
    """State of a folder whose files are whole, and what is wrong with either or None.  Collective.

    Args:
        judge: says on rank 0 what is wrong with the state.
    """
    fault, state = folders.fault(folder), {}
    if fault is None and comm.rank() == 0:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        fault = judge(state)
    return comm.all_gather_object((state, fault))[0]


def _accept(folder: Path, state: dict[str, Any], own: Mapping[str, Any], notes: list[str]) -> tuple[Found, list[str]]:
    refused, changed = differences(state["identity"], own)
    if refused:
        raise CheckpointError(
            f"{folder} is of another run: {'; '.join(refused)}. Set them back, or give another output_dir."
        )
    return Found(folder, state["step"], state), [*notes, *changed]


def _refuse_other_run(root: Path, own: Mapping[str, Any]) -> None:
    """A run folder without a checkpoint may be begun again, but only by the same run."""
    run = read_run(root)
    refused, _ = differences(run["identity"], own) if run is not None else ([], [])
    if refused:
        raise CheckpointError(
            f"output_dir = {root}: holds another run: {'; '.join(refused)}. Give another folder, or remove this one."
        )


def load_optimizer(folder: Path, optimizer: Optimizer, step: int) -> None:
    """Fill this rank's masters and moments from the files of however many ranks, and go on from there.  Collective."""
    with comm.all_or_none("reading the checkpoint"):
        wanted = optimizer.state()
        places = Places(wanted)
        lacking = {name: place.numel() for name, place in wanted.items()}
        for name in sorted(folders.read_manifest(folder)):
            if not name.startswith("optimizer-"):
                continue
            with safe_open(folder / name, framework="pt") as reader:
                for saved in reader.keys():  # noqa: SIM118
                    for key, place, rows in places.of(saved):
                        value = reader.get_slice(saved)[rows]
                        assert value.shape == place.shape, f"{key}: {tuple(value.shape)}, must be {tuple(place.shape)}"
                        place.copy_(value)
                        lacking[key] -= place.numel()
        for key in (key for key, left in lacking.items() if left):
            raise CheckpointError(f"{folder}: holds not all of {key}. Take another checkpoint.")
    optimizer.resume(step)


class Store:
    """The checkpoints of one run.  Construct and call on every rank."""

    def __init__(self, root: Path, settings: CheckpointConfig, own: Mapping[str, Any]):
        self.root = root / "checkpoints"
        self.settings = settings
        self.identity = own
        self.newest: int | None = None
        self.best: dict[str, Any] | None = None

    def open(self, found: Found | None) -> None:
        """Make the folder, finish what was left half-done, and set aside what is newer than ``found``.  Collective."""
        own = found is not None and found.folder.parent == self.root

        def prepare() -> dict[str, Any] | None:
            if comm.rank() != 0:
                return None
            self.root.mkdir(parents=True, exist_ok=True)
            folders.clear(self.root)
            for name in saved_steps(self.root):
                if found is not None and _step_of(name) > found.step:  # damaged, or found would not be older
                    aside = self.root / f"{name}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.root / name).rename(aside)
            self.best = self._read_best(found)
            if found is not None and own:
                self._tidy(found.step)
                self._point_at_best()
            return self.best

        with comm.all_or_none("opening the checkpoints"):
            best = prepare()
        self.best = comm.all_gather_object(best)[0]
        self.newest = found.step if found is not None and own else None

    def _read_best(self, found: Found | None) -> dict[str, Any] | None:
        """The better one of best.json's and that of ``found``: a crash may have come between the two."""
        if found is None or found.state["identity"]["eval_data"] != self.identity["eval_data"]:
            return None
        named = [best for best in (self._read_best_file(), found.state["best"]) if best is not None]
        there = [best for best in named if (self.root / f"step-{best['step']}").is_dir()]
        return min(there, key=lambda best: best["eval_loss"], default=None)

    def _read_best_file(self) -> dict[str, Any] | None:
        path = self.root / "best.json"
        if not path.is_file():
            return None
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            return {"step": int(read["step"]), "eval_loss": float(read["eval_loss"])}
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} is damaged. Remove it: the best checkpoint so far is then forgotten."
            ) from error

    def save(
        self, step: int, export: Mapping[str, folders.Content], states: folders.Content, state: Mapping[str, Any]
    ) -> int:
        """Write ``step-N`` and remove what is no longer kept.  Returns its bytes.  Collective.

        Args:
            export: this rank's files of ``adapter/`` (rank 0 has all) or ``model/``, by path in the checkpoint.
            states: this rank's masters and moments.
            state: what else ``state.json`` shall hold.

        Raises:
            RankError: on all ranks; the older checkpoints are as they were.
        """
        rank, world_size = comm.rank(), comm.world_size()
        own = {f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors": states, **export}
        if rank == 0:
            whole = {"format": FORMAT, "step": step, **state, "world_size": world_size, "identity": self.identity}
            own[STATE] = (json.dumps(whole, indent=1) + "\n").encode()
        size = folders.write(self.root / f"step-{step}", own, self.settings.timeout_seconds)
        self.newest = step
        folders.on_all("removing old checkpoints", lambda: self._tidy(step), self.settings.timeout_seconds)
        return size

    def _tidy(self, step: int) -> None:
        """``latest`` follows; what is neither among the last ones nor the best goes, and so do the layer groups."""
        if comm.rank() != 0:
            return
        folders.replace_file(self.root / "latest", f"step-{step}\n")
        self._prune()
        for group in self.root.glob("init-*-of-*"):
            folders.remove(group)

    def _prune(self) -> None:
        kept = {f"step-{self.best['step']}"} if self.best is not None else set()
        for name in saved_steps(self.root)[self.settings.keep_last :]:
            if name not in kept:
                folders.remove(self.root / name)

    def is_best(self, loss: float) -> bool:
        """Is this eval loss lower than that of every checkpoint so far?  Not collective; the same on all ranks."""
        return math.isfinite(loss) and (self.best is None or loss < self.best["eval_loss"])

    def set_best(self, step: int, loss: float) -> None:
        """``step-N``, which is saved, is the best so far.  Collective."""
        self.best = {"step": step, "eval_loss": loss}
        folders.on_all("noting the best checkpoint", self._point_at_best, self.settings.timeout_seconds)

    def _point_at_best(self) -> None:
        """And the best before it goes."""
        if comm.rank() == 0 and self.best is not None:
            folders.replace_file(self.root / "best.json", json.dumps(self.best) + "\n")
            self._prune()

    def save_group(self, name: str, part: Initialisation, owned: Sequence[Target]) -> None:
        """Keep the initial pairs of a layer group, of which this rank owns some.  Collective."""
        tensors = {
            f"{layer.name}.lora_{side}": tensor.contiguous()
            for layer in owned
            for side, tensor in zip("AB", part.pairs[layer.name], strict=True)
        }
        own = {f"pairs-{comm.rank():05d}-of-{comm.world_size():05d}.safetensors": encode_tensors(tensors)}
        if comm.rank() == 0:
            content = {"format": FORMAT, "rows": part.rows, "loss": part.loss, "identity": self.identity}
            own[STATE] = (json.dumps(content, indent=1) + "\n").encode()
        folders.write(self.root / name, own, self.settings.timeout_seconds)

    def load_group(self, name: str) -> tuple[Initialisation | None, str | None]:
        """A layer group that was kept, or None and, if there is one that cannot be used, why.  Collective."""
        folder = self.root / name
        if not comm.all_gather_object(folder.is_dir())[0]:
            return None, None
        state, fault = _read_state(
            folder, lambda state: "; ".join(differences_of_group(state["identity"], self.identity))
        )
        if fault:
            with comm.all_or_none("removing a damaged layer group"):
                if comm.rank() == 0:
                    folders.remove(folder)
            return None, f"{name} is computed again: {fault}"
        part = Initialisation(rows=state["rows"], loss=state["loss"])
        for row in part.rows:
            if "coverage" in row:  # JSON has no keys but strings
                row["coverage"] = {int(rank): share for rank, share in row["coverage"].items()}
        with comm.all_or_none("reading a layer group"):
            for path in sorted(folder.glob("pairs-*.safetensors")):
                with safe_open(path, framework="pt") as reader:
                    for key in reader.keys():  # noqa: SIM118
                        if key.endswith(".lora_A"):
                            layer = key.removesuffix(".lora_A")
                            pair = (reader.get_tensor(key), reader.get_tensor(f"{layer}.lora_B"))
                            part.pairs[layer] = (pair[0].to(comm.device()), pair[1].to(comm.device()))
        return part, None


def initial_pairs(found: Found, config: Config, targets: Sequence[Target]) -> adapters.Pairs | None:
    """A0 and B0 as they were set, where they are part of what changed the base.  Not collective."""
    return adapters.initial_pairs_of(found.folder / "adapter", targets) if config.changes_base else None


def frozen_pairs(found: Found, config: Config, targets: Sequence[Target]) -> adapters.Pairs:
    """A and B where they do not train.  Not collective."""
    return adapters.frozen_pairs(found.folder / "adapter", targets) if config.lora.kind == "lora_sb" else {}
