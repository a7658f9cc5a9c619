"""What every conversion reads and writes: tensors read when they are needed, folders that are whole or not there.

A checkpoint of any format is a mapping of names to :class:`LazyTensor`, type and shape known, values not yet read.  A
conversion is a function from such mappings to such mappings; :func:`write_safetensors` then holds one tensor at a
time.  Nothing here is collective.  Peak memory: one tensor for each worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_one_dist.disk import folders
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, read_json, read_safetensors, write_safetensors
from lora_one_dist.disk.weights import beside_weights

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHECKSUMS = "SHA256SUMS"
TEMPLATES = {"chat_template.jinja", "chat_template.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
TOKENIZER |= {"vocab.json", "vocab.txt", "merges.txt"}  # and *.model
SHARD_BYTES = 5 * 10**9  # as transformers' save_pretrained cuts them
SPARE_BYTES = 64 * 2**20  # of the disk, for what is not weights
READ_BYTES = 16 * 2**20  # hashed at a time
PROGRESS_SECONDS = 0.5  # between two lines of progress on a terminal
LOG_SECONDS = 10.0  # and where they go to a file


def model_shards(folder: Path) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of a Hugging Face model's folder, by file and by name.

    Raises:
        ConversionError: if there are no safetensors, or a shard is missing or lacks what the index says it holds.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ConversionError(
                f"{folder}: holds neither {INDEX} nor {SINGLE}. Give a folder with the model's safetensors "
                "(save_pretrained writes them)."
            )
        return {SINGLE: read_safetensors([folder / SINGLE])}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: has no weight_map. Fetch it again.")
    if any(Path(file).name != file for file in weight_map.values()):
        raise ConversionError(f"{index}: names a file outside of its folder. Fetch it from whom you trust.")
    shards = {file: read_safetensors([folder / file]) for file in sorted(set(weight_map.values()))}
    held = {name: file for file, tensors in shards.items() for name in tensors}
    wrong = sorted(name for name in held.keys() | weight_map.keys() if held.get(name) != weight_map.get(name))
    if wrong:
        raise ConversionError(
            f"{index}: does not fit its files, e.g. {wrong[0]} should be in {weight_map.get(wrong[0])} and is in "
            f"{held.get(wrong[0])}. Fetch the checkpoint again."
        )
    return shards


def shard(tensors: Mapping[str, LazyTensor], max_bytes: int = SHARD_BYTES) -> dict[str, dict[str, LazyTensor]]:
    """Cut a model into files of at most ``max_bytes``, in order; a larger tensor gets a file of its own.  Pure."""
    parts: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.num_bytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.num_bytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def num_bytes(shards: Mapping[str, Mapping[str, LazyTensor]]) -> int:
    """Of all tensors of a model, by file and by name."""
    return sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors.values())


def write_model(
    folder: Path, shards: Mapping[str, Mapping[str, LazyTensor]], workers: int = 1, say: Callable[[str], None] = print
) -> None:
    """Write safetensors files and, for more than one, their index.

    Args:
        workers: files written at a time, each by a thread that holds one tensor.
    """
    progress = Progress("tensors", sum(map(len, shards.values())), num_bytes(shards), say)
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = [
            pool.submit(write_safetensors, folder / file, tensors, progress.add) for file, tensors in shards.items()
        ]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure: no more files are begun
    progress.end()
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        content = {"metadata": {"total_size": num_bytes(shards)}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write to that appears under its name, with the hash of every file, when the block has ended well.

    Otherwise what was written is removed.

    Raises:
        ConversionError: before anything is written, if there is such a folder, or no room for ``needed_bytes``.
    """
    refuse_existing(folder)
    refuse_full_disk(folder, needed_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir()
    try:
        yield partial
        write_checksums(partial)
        folders.sync_folder(partial)
        refuse_existing(folder)  # made by another in the meantime
        partial.rename(folder)
        folders.sync_folder(folder.parent)
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be written: {error.strerror or error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    """Raise ConversionError if there is anything under that name."""
    if folder.exists() or folder.is_symlink():
        raise ConversionError(f"{folder}: is there already, and is not overwritten. Give a new name, or remove it.")


def refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    """Raise ConversionError if the disk has no room for so many bytes and SPARE_BYTES."""
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(above).free
    if free < needed_bytes + SPARE_BYTES:
        raise ConversionError(
            f"{folder}: needs {readable(needed_bytes + SPARE_BYTES)}, {above} has {readable(free)} free. Make room, or "
            "write elsewhere."
        )


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder's tokenizer and chat template, by name."""
    beside = beside_weights(folder)
    return {name: path for name, path in beside.items() if name in TOKENIZER | TEMPLATES or path.suffix == ".model"}


def copy(paths: Mapping[str, Path], destination: Path) -> None:
    """Copy files into a folder, under these names."""
    for name, path in paths.items():
        shutil.copyfile(path, destination / name)


def copy_rest(source: Path, destination: Path) -> None:
    """Copy all that stands beside a model's weights."""
    copy(beside_weights(source), destination)


def write_checksums(folder: Path) -> None:
    """Write what ``sha256sum -c SHA256SUMS`` checks: the hash of every file, as read back."""
    lines = [f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in _files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def wrong_checksums(folder: Path) -> list[str] | None:
    """Files that are not what was written, or None if the folder has no list of hashes."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    pairs = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return [name for sha, name in pairs if not (folder / name).is_file() or _sha256(folder / name) != sha]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(count: float) -> str:
    """Bytes for people: 1 GB is 10^9."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


class Progress:
    """How far a long piece of work has come: one line that is rewritten on a terminal, few lines in a file."""

    def __init__(self, what: str, items: int, total_bytes: int, say: Callable[[str], None] = print):
        self.what, self.items, self.total = what, items, total_bytes
        self.say = say
        self.done = self.done_bytes = 0
        self.started = self.said = time.monotonic()

    def add(self, count: int) -> None:
        """One more item of so many bytes.  From any thread."""
        self.done += 1
        self.done_bytes += count
        now = time.monotonic()
        terminal = sys.stdout.isatty() and self.say is print
        if now - self.said < (PROGRESS_SECONDS if terminal else LOG_SECONDS):
            return
        self.said = now
        left = (now - self.started) * (self.total - self.done_bytes) / max(1, self.done_bytes)
        share = f"{readable(self.done_bytes)} of {readable(self.total)}"
        line = f"{self.what} {self.done}/{self.items}, {share}, {left:.0f} s left"
        if terminal:
            print(f"\r{line}\x1b[K", end="", flush=True)
        else:
            self.say(line)

    def end(self) -> None:
        seconds = time.monotonic() - self.started
        start = "\r\x1b[K" if sys.stdout.isatty() and self.say is print else ""
        self.say(f"{start}{self.what} {self.done}/{self.items}, {readable(self.done_bytes)} in {seconds:.1f} s")
