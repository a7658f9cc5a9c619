"""How a run stops when a signal asks for it: at a point where nothing is lost, all ranks together."""

from __future__ import annotations

from lora_one_dist.cluster import comm
from lora_one_dist.run.metrics import RunFolder
from lora_one_dist.train.loop import TrainError


class Stopped(Exception):  # noqa: N818 (no error)
    """The job was asked to stop, has saved what it has done, and goes on when it is started again."""


def stop_if_asked(record: RunFolder, saved: bool) -> None:
    """While initialising, at a point where nothing is lost.  Collective.

    Not if this start has ``saved`` nothing: it would stop again at the same point, and again.

    Raises:
        Stopped: on all ranks, if any of them was asked.
        TrainError: if it was, and nothing could be saved.
    """
    if any(comm.all_gather_floats(float(comm.stop_asked()))):
        if not saved:
            raise TrainError("asked to stop, but the initialisation so far could not be saved")
        stop(record, "with the initialisation so far")


def stop(record: RunFolder, saved: str) -> None:
    """Say so and raise Stopped, on all ranks.  ``saved``: how far the run has come."""
    record.say(f"stopped as asked, {saved} saved; the same command goes on from there")
    record.close()
    raise Stopped
