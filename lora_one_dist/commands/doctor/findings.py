"""Facts judged: what is at fault, where, and the remedy; a table of them.  Pure, but for what says."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from statistics import median
from typing import Any

from lora_one_dist.commands.doctor.facts import PACKAGES, UNKNOWN, Row

BROKEN = ("missing", "unreadable", "unwritable")  # how a fact begins that is a fault on any number of hosts
SAME_PACKAGES = "Install the same everywhere: pip install -c constraints.txt -e ."
SAME_NAME = "Correct /etc/hosts or the name server there."
SAME_VARIABLE = "Set it alike: .deepspeed_env under deepspeed, export before srun and torchrun, -x after mpirun."
AGREE = {  # facts that must be alike, and the remedy
    "python": "Start the same Python everywhere.",
    **dict.fromkeys((*PACKAGES, "CUDA"), SAME_PACKAGES),
    "code": "All hosts must run the same files: share the checkout, or copy it again.",
    "folder": "The job starts there on every host: share the folder, or make it under the same path.",
    "model": "All hosts must read the same model: share its folder, or copy it again.",
    "output": "Give an output folder that can be written.",
    "GPUs": "Compare nvidia-smi; give a job hosts that are alike, with one driver.",
}
LEAST = {  # facts with a lower bound
    "disk GiB": (1.0, "Free the disk of the output folder."),
    "shm GiB": (0.25, "NCCL and data loaders use /dev/shm; docker's 64 MiB are too few: --shm-size=8g."),
    "open files": (1024, "Raise it: ulimit -n 65536."),
}
HALF = {  # facts that must be at least half of the other hosts' median
    "memory GiB": "Does another job run there?",
    "inside GB/s": "Look at the links of its GPUs (nvidia-smi topo -m), and for another job.",
    "link GB/s": "Look at its network card, cable and switch port (ethtool, ibstat), and at the interface used.",
}
HIDDEN = ("rank", "names", "variables", "time")
CELL = 24  # characters
CLOCK_SECONDS = 1.0


def odd_ones_out(rows: Sequence[Row]) -> list[str]:
    """One line per fault.  Facts that rows lack are not judged."""
    seen = [row for row in rows if "error" not in row]
    errors = [str(row["error"]) for row in rows if "error" in row]
    return errors + differing(seen) + too_little(seen) + slow(seen) + wrong_clocks(seen)


def differing(rows: Sequence[Row]) -> list[str]:
    """Faults of what must be alike: facts, variables, and what each name means."""
    set_somewhere = dict.fromkeys(name for row in rows for name in row.get("variables", ()))
    remedies = AGREE | dict.fromkeys(set_somewhere, SAME_VARIABLE)
    views = [row | {name: row.get("variables", {}).get(name, "unset") for name in set_somewhere} for row in rows]
    for name in dict.fromkeys(name for row in rows for name in row.get("names", ())):
        remedies[f"{name} resolves to"] = SAME_NAME
        known = any(row["names"][name] != UNKNOWN for row in rows if row["host"] != name)
        for row, view in zip(rows, views, strict=True):
            if row["host"] != name or (known and not _is_private(row)):
                view[f"{name} resolves to"] = row["names"][name]
    return [fault for fact, remedy in remedies.items() for fault in _odd_values(views, fact, remedy)]


def _is_private(row: Row) -> bool:
    """Does its own name say nothing to others?  Debian has it loop back, containers need not know it."""
    own = row["names"].get(row["host"], UNKNOWN)
    return own == UNKNOWN or own.startswith("127.")


def _odd_values(rows: Sequence[Row], fact: str, remedy: str) -> list[str]:
    having = by_value(rows, fact)
    broken = [value for value in having if str(value).startswith(BROKEN)]
    faults = [f"{fact} {value} on {who(having.pop(value))}. {remedy}" for value in broken]
    usual = majority(having)
    if usual is None and len(having) > 1:
        each = ", ".join(f"{value} on {who(of)}" for value, of in having.items())
        return [*faults, f"{fact} {each}: no majority. {remedy}"]
    others = "the others" if len(having) == 2 else "most"
    return faults + [
        f"{fact} {value} on {who(of)}, {usual} on {others}. {remedy}" for value, of in having.items() if value != usual
    ]


def by_value(rows: Sequence[Row], fact: str) -> dict[Any, list[Row]]:
    """The rows that have each value of a fact."""
    having: dict[Any, list[Row]] = {}
    for row in rows:
        if fact in row:
            having.setdefault(row[fact], []).append(row)
    return having


def majority(having: Mapping[Any, Sequence[Row]]) -> Any:
    """The value of more than half of the hosts, or None.  Each host has one vote, which its ranks share."""
    ranks_of = Counter(row["host"] for rows in having.values() for row in rows)
    votes = {value: sum(Fraction(1, ranks_of[row["host"]]) for row in rows) for value, rows in having.items()}
    return next((value for value, vote in votes.items() if 2 * vote > len(ranks_of)), None)


def who(rows: Sequence[Row]) -> str:
    """'node3 (ranks 4-5)', or the host alone over ssh."""
    hosts = ", ".join(dict.fromkeys(row["host"] for row in rows))
    ranks = [row["rank"] for row in rows if "rank" in row]
    return f"{hosts} (rank{'s' * (len(ranks) > 1)} {ranges(ranks)})" if ranks else hosts


def ranges(numbers: Sequence[int]) -> str:
    """'0-3,8' for 0, 1, 2, 3, 8."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def per_host(rows: Sequence[Row], fact: str) -> dict[str, float]:
    """The least number of each host that has any."""
    measured = by_value([row for row in rows if row.get(fact) is not None], "host")
    return {host: min(row[fact] for row in of) for host, of in measured.items()}


def too_little(rows: Sequence[Row]) -> list[str]:
    """Faults of what is short, whatever the others have."""
    return [
        f"{fact} {value:.3g} on {host}: must be at least {least:g}. {remedy}"
        for fact, (least, remedy) in LEAST.items()
        for host, value in per_host(rows, fact).items()
        if value < least
    ]


def slow(rows: Sequence[Row]) -> list[str]:
    """Faults of hosts below half of the others' median.  Of fewer than three hosts none can be told apart."""
    faults = []
    for fact, remedy in HALF.items():
        values = per_host(rows, fact)
        for host, value in values.items() if len(values) > 2 else ():
            usual = median(other for name, other in values.items() if name != host)
            if value < usual / 2:
                faults.append(f"{fact} {value:.3g} on {host}: below half of {usual:.3g}, the others' median. {remedy}")
    return faults


def wrong_clocks(rows: Sequence[Row]) -> list[str]:
    """Faults of clocks more than a second apart: those away from the middle."""
    offsets = per_host(rows, "clock s")
    if not offsets or max(offsets.values()) - min(offsets.values()) <= CLOCK_SECONDS:
        return []
    return [
        f"clock of {host} {offset - median(offsets.values()):+.1f} s from the middle one. Start chrony or ntpd there."
        for host, offset in offsets.items()
        if abs(offset - median(offsets.values())) > CLOCK_SECONDS / 2
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What is no fault but good to know."""
    hosts = {row["host"]: row for row in rows}
    said = [
        f"{host} resolves its own name to {row['names'][host]}. Training does not mind: it sets the interface itself."
        for host, row in hosts.items()
        if host in row.get("names", ()) and _is_private(row)
    ]
    if {row.get("model") for row in rows} == {"no folder"}:
        said.append("the model is taken for a name on the hub: its files were not looked at.")
    if len(hosts) == 2 and "link GB/s" in rows[0]:
        said.append("of two hosts neither can be called slow: compare the figures yourself.")
    return said


def table(rows: Sequence[Row]) -> list[str]:
    """One line for the ranks of a host that are alike; what all rows have alike stands below, once."""
    shown = [fact for fact in dict.fromkeys(fact for row in rows for fact in row) if fact not in HIDDEN]
    cells = {fact: [_cell(row.get(fact)) for row in rows] for fact in shown}
    same = [fact for fact in shown if fact != "host" and len(set(cells[fact])) == 1]
    columns = [fact for fact in shown if fact not in same]
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        ranks_of.setdefault(tuple(cells[fact][i][:CELL] for fact in columns), []).append(row.get("rank", i))
    lines = [["rank", *columns], *([ranges(ranks), *line] for line, ranks in ranks_of.items())]
    lines = lines if "rank" in rows[0] else [line[1:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    alike = ["\xa0".join((fact, cells[fact][0])) for fact in same if cells[fact][0] != "-"]  # kept on one line
    wrapped = textwrap.wrap("everywhere: " + ", ".join(alike), 120, subsequent_indent="  ") if alike else []
    return text + [line.replace("\xa0", " ") for line in wrapped]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def report(say: Callable[[str], None], rows: Sequence[Row]) -> list[str]:
    """Say table, notes and faults.  Returns the faults."""
    seen, faults = [row for row in rows if "error" not in row], odd_ones_out(rows)
    for line in table(seen) if seen else ():
        say(line)
    for line in [f"note: {note}" for note in notes(seen)] + [f"fault: {fault}" for fault in faults]:
        say(line)
    return faults


def many(number: int, what: str) -> str:
    """'1 host', '2 hosts'."""
    return f"{number} {what}{'s' * (number != 1)}"
