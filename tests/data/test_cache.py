"""A cache that cannot be written to is named; the data file is not blamed for it."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import pytest

from lora_one_dist.commands import inspect_data, prepare_data
from lora_one_dist.data.cache import CacheError, writable_cache
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows, placing

NAMED = (
    rf"HF_DATASETS_CACHE = %s: cannot be written to on {socket.gethostname()} \(.*%s.*\); what is read and tokenised "
    r"is kept there\. Make room or set its permissions, or set HF_DATASETS_CACHE \(or HF_HOME, in which it is by "
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of the test's own: that of the session may be another room's by now."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return path


@pytest.mark.parametrize("folder", ["/proc/nope", "a file"])
def test_a_cache_that_cannot_be_made_is_named_before_data_are_read(folder, tmp_path, monkeypatch):
    if folder == "a file":
        folder = str(tmp_path / "file")
        Path(folder).write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    with pytest.raises(CacheError, match=NAMED % (folder, "")), writable_cache():
        pytest.fail("the block ran")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "in the cache"], ids=str)
def test_a_cache_that_fails_while_data_are_read_is_named(error, rows, folder):
    """As `datasets` and `load_rows` wrap it, each in an error of its own."""
    if error == "in the cache":
        error = PermissionError(errno.EACCES, "Permission denied", str(folder / "json" / "x.arrow"))

    def read() -> None:
        try:
            raise RuntimeError("An error occurred while generating the dataset") from error
        except RuntimeError as failure:
            raise DataError(f"{rows}: cannot be read") from failure

    with pytest.raises(CacheError, match=NAMED % (folder, error.strerror)), writable_cache():
        read()


def test_a_fault_of_the_data_file_stays_one(rows, folder):
    rows.write_text("{\n")
    with pytest.raises(DataError, match=r"train\.jsonl, line 1"), writable_cache(), placing(str(rows)):
        load_rows(str(rows), "train", None).to_list()
    with pytest.raises(PermissionError), writable_cache():
        raise PermissionError(errno.EACCES, "Permission denied", str(rows))
    assert not list(folder.glob("tmp*")), "nothing of the trial is left"


def test_tools_that_read_data_name_it_too(rows, tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nope")
    run = {"model": {"path": str(model_folder("llama"))}, "data": {"train": str(rows)}, "train": {"max_steps": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"output_dir": str(tmp_path / "out")}))
    capsys.readouterr()
    assert inspect_data.main(["--config", str(tmp_path / "run.yaml")]) == 1
    assert capsys.readouterr().err.startswith("HF_DATASETS_CACHE = /proc/nope: cannot be written to")
    assert prepare_data.main(["alpaca", "--source", str(rows), "--out", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.startswith("error: HF_DATASETS_CACHE = /proc/nope: cannot be written to")
