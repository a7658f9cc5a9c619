"""Disks that are full, read-only, gone, slow or hung in mid-run: what was saved stays whole, nothing else is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from lora_one_dist.base import loading
from lora_one_dist.cluster import comm
from lora_one_dist.config.reading import parse_config
from lora_one_dist.disk import folders
from lora_one_dist.run import metrics, saving
from lora_one_dist.run.story import run
from lora_one_dist.train import loop
from tests.ranks import run_commands
from tests.runs import settings

STEPS, BAD, GOOD = 6, 3, 5  # the disk is out of order from before step BAD until before step GOOD
MIB = 2**20
FULL, READ_ONLY, GONE = "No space left on device", "Read-only file system", "No such file or directory"


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MiB to break."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        required = os.environ.get("CLUSTER_TESTS") == "required"
        (pytest.fail if required else pytest.skip)(f"cannot mount a disk to break (needs root): {error}")
    yield place
    unmount(place)
    unmount(place)


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


FAULTS = {
    FULL: (fill, lambda place: (place / "filler").unlink()),
    # A second mount over the first: one that has files open for writing cannot be made read-only.
    READ_ONLY: (
        lambda place: (mount("--bind", str(place), str(place)), mount("-o", "remount,ro,bind", str(place))),
        unmount,
    ),
    # Seen by the next open as if the disk were gone: an empty folder where it was.
    GONE: (lambda place: mount("-t", "tmpfs", "tmpfs", str(place)), unmount),
}

EACH = [FULL, *(pytest.param(fault, marks=pytest.mark.full) for fault in (READ_ONLY, GONE))]


def run_with_fault(raw: dict, fault: str, place: Path) -> None:
    """Runs on a rank: a run whose disk is out of order for two steps."""
    broken, mended = FAULTS[fault]
    root, original = Path(raw["output_dir"]) / "checkpoints", loop._forward_backward

    def forward_backward(base, batches, step, *rest):
        for at, change in ((BAD, broken), (GOOD, mended)):
            if step + 1 == at:
                comm.barrier()
                if comm.rank() == 0:
                    change(place)
                comm.barrier()
                if fault != GONE or at == GOOD:
                    assert folders.fault(root / f"step-{BAD - 1}") is None, "it is whole all the time"
        return original(base, batches, step, *rest)

    loop._forward_backward = forward_backward
    run(parse_config(raw))


def said_by(folder: Path, function, *args) -> str:
    """What rank 0 of 2 says in a run that ends well."""
    ended = run_commands(folder, 2, function, *args)
    assert [code for code, _ in ended] == [0, 0], ended
    return (folder / "0.stdout").read_text()


def plain_run(raw: dict) -> None:
    run(parse_config(raw))


def outcome(out: Path):
    """Every loss in order, and the adapter's hash."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return losses, hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def tiny(model_folder, out: Path, **changes) -> dict:
    """A run that saves at every step; changes of the group checkpoint."""
    raw = settings(model_folder("llama"), out, train__max_steps=STEPS, train__log_steps=1)
    raw["data"]["eval"] = None
    return {**raw, "checkpoint": {"steps": 1, **changes}}


@pytest.fixture(scope="module")
def straight(model_folder, tmp_path_factory):
    """The outcome where nothing happens to the disk."""
    folder = tmp_path_factory.mktemp("straight")
    raw = tiny(model_folder, folder / "run")
    said_by(folder, plain_run, raw)
    return outcome(Path(raw["output_dir"]))


@pytest.mark.parametrize("fault", EACH)
def test_run_goes_on_without_saving_until_the_disk_is_back(fault, model_folder, straight, disk, tmp_path):
    text = said_by(tmp_path, run_with_fault, tiny(model_folder, disk / "run"), fault, disk)
    for step in (BAD, BAD + 1):
        assert f"checkpoint step-{step} saved" not in text
        warning = next(line for line in text.splitlines() if f"writing {disk}/run/checkpoints/step-{step}:" in line)
        assert warning.startswith("warning: ")
        assert fault in warning
    for step in (*range(BAD), GOOD, STEPS):
        assert f"checkpoint step-{step} saved" in text
    assert outcome(disk / "run") == straight
    assert not (disk / "filler").exists()


@pytest.mark.parametrize("fault", EACH)
def test_run_that_shall_stop_names_the_fault_and_goes_on_when_the_disk_is_back(
    fault, model_folder, straight, disk, tmp_path
):
    raw = tiny(model_folder, disk / "run", on_failure="stop")
    ended = run_commands(tmp_path, 2, run_with_fault, raw, fault, disk)
    assert [code for code, _ in ended] == [1, 1]
    said = "".join(stderr for _, stderr in ended)
    assert f"failed while writing {disk}/run/checkpoints/step-{BAD}" in said
    assert fault in said
    FAULTS[fault][1](disk)
    saved = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir() if path.name.startswith("step"))
    assert saved == [f"step-{BAD - 2}", f"step-{BAD - 1}"]
    said_by(tmp_path, plain_run, raw)
    assert outcome(disk / "run") == straight


def run_slow(raw: dict, seconds: float, collective_seconds: float) -> None:
    """Runs on a rank: the disk of the last rank takes so long for its file of step BAD."""
    write_file, set_timeout = folders._write_file, comm.set_timeout

    def slow(path: Path, content: bytes):
        if f"step-{BAD}.partial" in str(path) and comm.rank() == comm.world_size() - 1:
            time.sleep(seconds)
        return write_file(path, content)

    folders._write_file = slow
    comm.set_timeout = lambda _: set_timeout(collective_seconds)  # a config may not say so few
    run(parse_config(raw))


@pytest.mark.full
def test_disk_slower_than_the_time_out_of_collectives_ends_none(model_folder, straight, tmp_path):
    said = said_by(tmp_path, run_slow, tiny(model_folder, tmp_path / "run"), 5.0, 2.0)
    assert f"checkpoint step-{BAD} saved" in said
    assert "warning" not in said
    assert outcome(tmp_path / "run") == straight


def test_disk_that_hangs_fails_the_checkpoint_not_the_run(model_folder, straight, tmp_path):
    said = said_by(tmp_path, run_slow, tiny(model_folder, tmp_path / "run", timeout_seconds=1), 2.5, 60.0)
    warning = next(line for line in said.splitlines() if line.startswith("warning: "))
    assert "rank 1 on " in warning
    assert "not done in 1 s (a slow disk, or one that is gone)" in warning
    assert f"checkpoint step-{BAD} saved" not in said
    assert f"checkpoint step-{BAD + 1} saved" in said
    assert outcome(tmp_path / "run") == straight


def run_without_weights(raw: dict) -> None:
    """Runs on a rank: to read a weight is an error of another type."""

    def load(*_):
        raise AssertionError("a weight is read")

    loading.load = load
    run(parse_config(raw))


def test_too_little_room_is_refused_before_a_weight_is_read(model_folder, disk, tmp_path):
    raw = tiny(model_folder, disk / "run")
    fill(disk)
    with (disk / "filler").open("r+b") as file:
        file.truncate(8 * MIB - 64 * 1024)
    ended = run_commands(tmp_path, 2, run_without_weights, raw)
    assert [code for code, _ in ended] == [1, 1]
    said = "".join(stderr for _, stderr in ended)
    assert re.search(r"0\.1 MiB are free, 2 checkpoints must fit", said), said
    assert "a weight is read" not in said


def run_full_at_the_end(raw: dict, place: Path) -> None:
    """Runs on a rank: a disk that is full when the adapter is written, and has room for the second try."""
    saving.RETRY_SECONDS = 0.3
    original, pause = saving.Saving.write_results, time.sleep

    def write_results(*arguments):
        if comm.rank() == 0:
            fill(place)
        comm.barrier()

        def make_room(seconds: float) -> None:
            if seconds == saving.RETRY_SECONDS:
                (place / "filler").unlink(missing_ok=True)
            pause(seconds)

        time.sleep = make_room
        original(*arguments)

    saving.Saving.write_results = write_results
    run(parse_config(raw))


def test_full_disk_at_the_end_is_tried_again(model_folder, straight, disk, tmp_path):
    said = said_by(tmp_path, run_full_at_the_end, tiny(model_folder, disk / "run"), disk)
    assert "failed while writing the adapter" in said
    assert FULL in said
    assert outcome(disk / "run") == straight
    assert json.loads((disk / "run" / "summary.json").read_text())["steps"] == STEPS


def test_no_line_of_the_metrics_is_lost_on_a_full_disk_and_tensorboard_comes_back(disk, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = metrics.RunFolder(disk, writes=True, stop_on_failure=False)
    record.log(1, {"loss": 0.5})
    fill(disk)
    text = "x" * 300  # so that more is kept than any buffer of a file holds
    for step in range(2, 100):
        record.log(step, {"loss": 0.5, "text": text})
        time.sleep(0.002)  # for TensorBoard's thread
    (disk / "filler").unlink()
    for step in (100, 101, 102):
        record.log(step, {"loss": 0.25})
    record.close()
    lines = [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 103))
    said = capfd.readouterr().out
    assert said.count("warning: metrics.jsonl and TensorBoard cannot be written") == 1
    shown = [event.step for event in EventAccumulator(str(disk / "tensorboard")).Reload().Scalars("loss")]
    assert shown[-1] == 102
