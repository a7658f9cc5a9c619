"""Folders that are whole or not there: what a failed write, a hung disk and a changed byte leave."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from lora_one_dist.cluster import comm
from lora_one_dist.cluster.launchers import Launch
from lora_one_dist.disk import folders
from tests.ranks import _context, free_port, run_ranks

PATIENCE = 1.0  # seconds for a disk, where it is meant to hang
HUNG_SECONDS = 6.0  # how long it does


@pytest.fixture
def alone():
    """This process as the only rank."""
    comm.init(launch=Launch("test", 0, 1, 0, "127.0.0.1", free_port()))
    yield
    comm.shutdown()


def files_of(rank: int) -> dict[str, bytes]:
    return {f"{rank}.bin": bytes(range(100)) * (rank + 1), f"inner/{rank}.txt": b"rank %d\n" % rank}


def write_twice(root: Path, broken: str, victim: int) -> dict:
    """Runs on a rank: a write during which ``broken`` happens on one rank, then one in which it does not."""
    rank, original = comm.rank(), folders._write_file

    def hurt(path: Path, content: bytes) -> dict:
        if broken == "raises before":
            raise OSError(28, "No space left on device")
        entry = original(path, content)
        if broken == "raises after":
            raise OSError(5, "Input/output error")
        time.sleep(HUNG_SECONDS)
        return entry

    folders._write_file = hurt if rank == victim else original
    started, error = time.monotonic(), None
    try:
        folders.write(root / "first", files_of(rank), PATIENCE)
    except comm.RankError as raised:
        error = str(raised)
    seconds = time.monotonic() - started
    folders._write_file = original
    comm.barrier()
    left = sorted(path.name for path in root.iterdir())
    size = folders.write(root / "second", files_of(rank), 60)
    return {"error": error, "seconds": seconds, "left": left, "size": size, "fault": folders.fault(root / "second")}


@pytest.mark.parametrize("broken", ["raises before", "raises after", "hangs"])
@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (3, 2)])
def test_write_that_fails_on_one_rank_leaves_no_folder_and_no_collective_behind(broken, world_size, victim, tmp_path):
    for rank, found in enumerate(run_ranks(world_size, write_twice, tmp_path, broken, victim)):
        assert found["error"].startswith(f"rank {victim} on "), f"on rank {rank}"
        assert f"failed while writing {tmp_path / 'first'}" in found["error"]
        expected = {"raises before": "No space left", "raises after": "Input/output", "hangs": "not done in 1 s"}[
            broken
        ]
        assert expected in found["error"]
        # The time-out, the longest pause between two questions, and a removal that does not wait for the hung disk.
        assert found["seconds"] < PATIENCE + HUNG_SECONDS / 2, "nobody waits for the disk"
        assert "first" not in found["left"]
        assert found["fault"] is None
        assert found["size"] == sum(len(content) for r in range(world_size) for content in files_of(r).values())
    names = {path.relative_to(tmp_path / "second").as_posix() for path in (tmp_path / "second").rglob("*.*")}
    assert names == {"manifest.json", *(name for r in range(world_size) for name in files_of(r))}


def write_with_a_failure_at_the_end(root: Path, function: str) -> tuple[str, list[str]]:
    """Runs on a rank: rank 0 fails when all files are written.  The error, and what is left."""

    def broken(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    original = getattr(folders, function)
    if comm.rank() == 0:
        setattr(folders, function, broken)
    try:
        folders.write(root / "made", files_of(comm.rank()), 60)
    except comm.RankError as error:
        setattr(folders, function, original)
        comm.barrier()
        return str(error), [path.name for path in root.iterdir()]
    raise AssertionError("written")


@pytest.mark.parametrize("function", ["manifest_text", "sync_folder"])
def test_failure_of_rank_0_when_all_files_are_there_leaves_nothing(function, tmp_path):
    for message, left in run_ranks(2, write_with_a_failure_at_the_end, tmp_path, function):
        assert message.startswith("rank 0 on ")
        assert f"failed while completing {tmp_path / 'made'}: OSError: [Errno 30] Read-only" in message
        assert left == []


def test_a_late_write_of_a_failed_try_does_not_spoil_the_next(tmp_path):
    """A disk that hung wakes up while the same folder is being written anew: that one is whole or refused."""
    for found in run_ranks(2, write_again_while_the_first_still_hangs, tmp_path):
        assert "not done in 1 s" in found["error"]
        assert found["fault"] is None or not found["there"]


def write_again_while_the_first_still_hangs(root: Path) -> dict:
    """Runs on a rank: rank 1's disk takes its first file late, after the second try has begun."""
    original = folders._write_file

    def late(path: Path, content: bytes) -> dict:
        folders._write_file = original
        time.sleep(2 * PATIENCE)
        return original(path, b"old")

    if comm.rank() == 1:
        folders._write_file = late
    error = ""
    try:
        folders.write(root / "made", files_of(comm.rank()), PATIENCE)
    except comm.RankError as raised:
        error = str(raised)
    folders._write_file = original
    folders.write(root / "made", files_of(comm.rank()), 60)
    time.sleep(2 * PATIENCE)  # the old write has come by now
    return {"error": error, "there": (root / "made").exists(), "fault": folders.fault(root / "made")}


# Manifests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(alone, tmp_path):
    folders.write(tmp_path / "whole", {"a/b.bin": bytes(1000), "c.txt": b"text\n", "empty": b""}, 60)
    assert folders.fault(tmp_path / "whole") is None
    return tmp_path / "whole"


def test_any_changed_byte_of_a_manifest_is_found(whole):
    """One bit of every byte, white space too: the manifest has one form only."""
    path = whole / "manifest.json"
    written = path.read_bytes()
    for i in range(len(written)):
        path.write_bytes(written[:i] + bytes([written[i] ^ 1]) + written[i + 1 :])
        assert str(path) in (folders.fault(whole) or ""), f"byte {i}, {written[i : i + 1]!r}"
    for other in (b"", b"{}", b"[]", b"null", b'{"files": []}', b"\xff", b"[" * 100_000, written[:-1], written + b"\n"):
        path.write_bytes(other)
        assert str(path) in (folders.fault(whole) or ""), other[:20]
    path.write_bytes(written)
    assert folders.fault(whole) is None


def test_manifest_in_another_form_is_refused(whole):
    path = whole / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    assert folders.fault(whole) == f"{path} is damaged: it is not what was written"


@pytest.mark.parametrize("name", ["/etc/hostname", "../other/file", "a/../../b"])
def test_manifest_that_names_a_file_outside_is_refused(name, whole):
    (whole / "manifest.json").write_text(folders.manifest_text({name: {"bytes": 1, "sha256": "0"}}))
    assert "it names a file outside of the folder" in folders.fault(whole)


@pytest.mark.parametrize("entry", [{}, None, {"bytes": 5}, {"bytes": "5", "sha256": ""}, {"bytes": 5, "sha256": None}])
def test_manifest_with_entries_of_another_kind_is_damaged(entry, whole):
    (whole / "manifest.json").write_text(folders.manifest_text({"c.txt": entry}))
    assert "manifest.json is damaged" in folders.fault(whole)


@pytest.mark.parametrize("name", ["a/b.bin", "c.txt", "empty"])
def test_any_damage_of_a_file_is_named(name, whole):
    path = whole / name
    content = path.read_bytes()
    for i in {0, len(content) // 2, len(content) - 1} if content else ():
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert folders.fault(whole) == f"{path} has other content than was written"
        path.write_bytes(content[:i])
        assert folders.fault(whole) == f"{path} has {i} bytes, {len(content)} were written"
    path.write_bytes(content + b"x")
    assert folders.fault(whole) == f"{path} has {len(content) + 1} bytes, {len(content)} were written"
    path.unlink()
    assert folders.fault(whole) == f"{path} cannot be read: No such file or directory"
    path.mkdir()
    assert folders.fault(whole) == f"{path} cannot be read: Is a directory"


# Alone ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["_write_file", "sync_folder", "remove"])
def test_replaced_folder_is_the_old_or_the_new_one(function, tmp_path, monkeypatch):
    """Whatever fails, a reader finds one whole folder; the next try takes away what was left."""
    target = tmp_path / "adapter"
    folders.replace(target, {"a": b"old", "b": b"old"})
    monkeypatch.setattr(folders, function, _fails)
    with pytest.raises(OSError, match="gone"):
        folders.replace(target, {"a": b"new"})
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a": b"old", "b": b"old"}
    monkeypatch.undo()
    folders.replace(target, {"a": b"new"})
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def _fails(*_: object) -> None:
    raise OSError("gone")


def test_what_a_crash_in_a_replacement_left_goes_with_the_next(tmp_path, monkeypatch):
    """Between the removal's rename and its end, then once more before the new one has its name."""
    target = tmp_path / "adapter"
    folders.replace(target, {"a": b"old"})
    monkeypatch.setattr(folders.shutil, "rmtree", lambda path, **_: _fails() if path.exists() else None)
    with pytest.raises(OSError, match="gone"):
        folders.replace(target, {"a": b"new"})
    monkeypatch.undo()
    assert not target.exists()
    folders.replace(target, {"a": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_replaced_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    folders.replace_file(path, "old")
    monkeypatch.setattr(os, "fsync", _fails)
    with pytest.raises(OSError, match="gone"):
        folders.replace_file(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    folders.replace_file(path, "new")
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("new", ["latest"])


def test_clear_takes_what_was_left_and_nothing_else(tmp_path):
    for name in (".step-1.partial", ".step-0.removed", "step-2", ".hidden", "step-3.partial"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / ".latest.partial").write_text("step-")
    folders.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "step-2", "step-3.partial"]


# Locks ----------------------------------------------------------------------------------------------------------------


def hold(path: Path, pipe) -> None:
    """Runs in another process: take the lock and keep it until told, or killed."""
    lock = folders.lock(path, 0.0)
    pipe.send("held")
    pipe.recv()
    lock.close()


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that has the lock."""
    monkeypatch.setattr(folders, "LOCK_PAUSE_SECONDS", 0.05)
    own, its = _context.Pipe()
    process = _context.Process(target=hold, args=(tmp_path / ".lock", its), daemon=True)
    process.start()
    assert own.recv() == "held"
    yield process, own
    process.kill()


def test_lock_of_another_process_is_refused_with_folder_and_remedy(holder, tmp_path):
    with pytest.raises(folders.FolderError, match="another job writes there") as caught:
        folders.lock(tmp_path / ".lock", 0.2)
    assert f"output_dir = {tmp_path}: another" in str(caught.value)
    assert "Wait for it, end it, or give this one another output_dir." in str(caught.value)


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_lock_is_free_as_soon_as_its_holder_ends(end, holder, tmp_path):
    process, pipe = holder
    if end == "killed":
        process.kill()
    else:
        pipe.send("go")
    started = time.monotonic()
    folders.lock(tmp_path / ".lock", 30.0).close()
    assert time.monotonic() - started < 10, "long before the lock's own patience"


def test_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.fcntl, "lockf", unsupported)
    folders.lock(tmp_path / ".lock", 0.0).close()


def test_size_is_told_of_a_folder_copied_elsewhere(whole, tmp_path):
    """A checkpoint may be moved: its manifest holds no path."""
    shutil.move(whole, tmp_path / "moved")
    assert folders.fault(tmp_path / "moved") is None
