"""The day that chat templates are told: the one on which a run began, whenever and wherever it goes on.

In: a :class:`Config`.  Out: the same with ``data.date``.  Collective.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.run import checkpoint


def with_day(config: Config) -> Config:
    """``data.date`` as given, or as the run in the folder or the checkpoint to go on from has it, or today's."""
    own = None
    with comm.all_or_none("looking for the day on which the run began"):
        if comm.rank() == 0:
            own = config.data.date or _saved(Path(config.output_dir), config.resume) or today()
    day = comm.all_gather_object(own)[0]
    return config.model_copy(update={"data": config.data.model_copy(update={"date": day})})


def today() -> datetime.date:
    """By this host's clock."""
    return datetime.date.today()


def _saved(root: Path, resume: str) -> datetime.date | None:
    run = checkpoint.read_run(root)
    state = Path(resume) / checkpoint.STATE
    if run is None and resume not in ("auto", "never") and state.is_file():
        run = json.loads(state.read_text(encoding="utf-8"))
    held = (run or {}).get("identity", {}).get("config", {}).get("data", {}).get("date")
    return None if held is None else datetime.date.fromisoformat(held)
