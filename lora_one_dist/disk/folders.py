"""Folders that are whole or not there: written by all ranks at once, a hash of every file, one rename.

In: each rank's files as bytes.  Out: ``folder/`` with those files and ``manifest.json``, which holds the size and
SHA-256 of each and a digest of itself.  The folder is on a file system that all ranks share.

Writing, all ranks together:

1. write      every rank writes and syncs its own files in ``.folder.partial/``
2. complete   rank 0 writes the manifest, syncs and renames

The disk is only touched in a thread, while the ranks ask each other again and again whether all have done: no
collective waits for a disk, and one that hangs becomes an error on all ranks.  Whoever finds ``folder/`` finds all of
it, unless it was damaged since, which :func:`fault` tells.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from lora_one_dist.cluster import comm

MANIFEST = "manifest.json"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.5  # between two questions whether all ranks have done
CLEANING_SECONDS = 5.0  # for a rank to remove what a failed write left, before it goes on
# A file server frees the lock of a lost host when its lease is over: 90 s for NFS 4. A requeued job must outwait that.
LOCK_SECONDS, LOCK_PAUSE_SECONDS = 100.0, 1.0

Result = TypeVar("Result")
Content = bytes | Callable[[], Iterable[bytes | memoryview]]  # of a file; a large one in pieces, as it is written


class FolderError(ValueError):
    """A folder that is not as it was written: which file, and what is wrong with it."""


def write(folder: Path, own: Mapping[str, Content], seconds: float) -> int:
    """Write a new folder that appears when it is whole.  Returns the bytes of its files.  Collective.

    Args:
        own: this rank's files, by path inside the folder; no two ranks may have the same.
        seconds: after which a rank whose disk has not taken its files counts as failed.

    Raises:
        RankError: on every rank, with the first failure; there is then no such folder.
    """
    partial = _beside(folder, "partial")

    def write_own() -> dict[str, dict[str, Any]]:
        partial.mkdir(exist_ok=True)  # and no folder above: where a disk is gone, nothing is written beneath it
        for inner in {(partial / name).parent for name in own}:
            inner.mkdir(parents=True, exist_ok=True)
        return {name: _write_file(partial / name, content) for name, content in own.items()}

    try:
        written = comm.all_gather_object(on_all(f"writing {folder}", write_own, seconds))
        files = {name: entry for entries in written for name, entry in entries.items()}
        on_all(f"completing {folder}", lambda: _complete(folder, partial, files), seconds)
    except comm.RankError:
        if comm.rank() == 0:  # make room; in a thread, since the disk may hang
            cleaner = threading.Thread(target=shutil.rmtree, args=(partial, True), daemon=True)
            cleaner.start()
            cleaner.join(CLEANING_SECONDS)
        comm.barrier()  # or another rank's next try would be cleaned away too
        raise
    return sum(entry["bytes"] for entry in files.values())


def on_all(doing: str, work: Callable[[], Result], seconds: float) -> Result:
    """Do disk work on every rank in a thread, and return this rank's result when all have done.  Collective.

    Raises:
        RankError: on every rank, if the work raises on one or takes longer than ``seconds``.
    """
    results: list[Result] = []
    failures: list[Exception] = []

    def body() -> None:
        try:
            results.append(work())
        except Exception as error:  # whatever it was, all ranks must learn of it
            failures.append(error)

    thread = threading.Thread(target=body, name=doing, daemon=True)
    thread.start()
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    waiting = True
    while waiting:
        thread.join(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        waiting = any(comm.all_gather_floats(float(thread.is_alive() and time.monotonic() < deadline)))
    with comm.all_or_none(doing):
        if failures:
            raise failures[0]
        if not results:
            raise TimeoutError(f"not done in {seconds:g} s (a slow disk, or one that is gone)")
    return results[0]


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write and sync.  Returns the file's entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in [content] if isinstance(content, bytes) else content():
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _complete(folder: Path, partial: Path, files: Mapping[str, Any]) -> None:
    if comm.rank() != 0:
        return
    _write_file(partial / MANIFEST, manifest_text(files).encode())
    for inner in {partial, *((partial / name).parent for name in files)}:
        sync_folder(inner)
    partial.rename(folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Let the folder's names survive a crash of the host."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write a small text file so that a reader finds the old or the new one, whole.  Not collective."""
    beside = _beside(path, "partial")
    _write_file(beside, text.encode())
    beside.replace(path)


def replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder without a manifest, in place of an older one.  Not collective."""
    beside = _beside(folder, "partial")
    for left in (beside, _beside(folder, "removed")):  # of one that never came to its end
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir()
    for name, content in files.items():
        _write_file(beside / name, content)
    sync_folder(beside)
    if folder.exists():
        remove(folder)
    beside.rename(folder)
    sync_folder(folder.parent)


def lock(path: Path, seconds: float = LOCK_SECONDS) -> IO[str]:
    """Take a lock that ends with this process, or when what is returned is closed.  Not collective.

    Raises:
        FolderError: if another process holds it for so long.
    """
    file = path.open("a")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            if time.monotonic() > deadline:
                remedy = "Wait for it, end it, or give this one another output_dir"
                raise FolderError(f"output_dir = {path.parent}: another job writes there. {remedy}.") from None
        time.sleep(LOCK_PAUSE_SECONDS)


def remove(folder: Path) -> None:
    """Remove a folder so that no reader finds a part of it.  Not collective."""
    doomed = _beside(folder, "removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def clear(parent: Path) -> None:
    """Remove what writes and removals that never came to their end have left.  Not collective."""
    for pattern in (".*.partial", ".*.removed"):
        for left in parent.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def manifest_text(files: Mapping[str, Any]) -> str:
    """The one text that stands for these files: a changed byte anywhere makes it another.  Pure."""
    listed = {name: files[name] for name in sorted(files)}
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": listed, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file.  Raises FolderError.  Not collective."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if manifest_text(files) != text:
            raise ValueError("it is not what was written")
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
            raise ValueError("it names a file outside of the folder")
        if not all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in files.values()):
            raise ValueError("a file's size or hash is of another kind")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path} is damaged: {error}") from error
    return files


def fault(folder: Path) -> str | None:
    """What is wrong with a folder, or None if every file is as it was written.  Collective; ranks share the reading."""
    reason = own_fault(folder, comm.rank(), comm.world_size())
    return next((found for found in comm.all_gather_object(reason) if found is not None), None)


def own_fault(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with the part of a folder that this rank reads, or None.  Not collective."""
    try:
        files = read_manifest(folder)
        largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        for name in largest_first[rank::world_size]:
            _check_file(folder / name, files[name])
    except FolderError as error:
        return str(error)
    return None


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                raise FolderError(f"{path} has {size} bytes, {entry['bytes']} were written")
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != entry["sha256"]:
        raise FolderError(f"{path} has other content than was written")
