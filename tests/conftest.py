"""One thread per process: reductions in one order, and ranks that do not fight for cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its pool
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on CPU ranks, also on a machine with GPUs
os.environ["DS_ACCELERATOR"] = "cpu"
# torch asks for the name of every address that connects (pytorch/pytorch#159007); a lost answer costs the time-out.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import pytest
import torch

from tests import hosts as four_hosts
from tests import models

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of a small model by kind, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str):
        path = root / kind
        return path if path.exists() else models.save(kind, path)

    return folder


def pytest_collection_modifyitems(items):
    """Mark the tests of the four hosts, which take both cores and run one at a time, to be chosen by that.

    And begin with the rooms that train: with short files at the end neither of two processes waits for the other.
    """
    items.sort(key=lambda item: item.path.parent, reverse=True)
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if {"hosts", "fresh_hosts"} & set(item.fixturenames) - set(given):
            item.add_marker(pytest.mark.four_hosts)


def _hosts(folder):
    reason = four_hosts.unavailable()
    if reason is not None:
        (pytest.fail if os.environ.get("CLUSTER_TESTS") == "required" else pytest.skip)(f"four hosts: {reason}")
    return four_hosts.Hosts(folder)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Four hosts with SLURM for the whole session; leave them whole."""
    with _hosts(tmp_path_factory.mktemp("hosts")) as made:
        made.start_slurm()
        yield made


@pytest.fixture
def fresh_hosts(tmp_path):
    """Four hosts of one test, to break."""
    with _hosts(tmp_path / "hosts") as made:
        yield made


@pytest.fixture(autouse=True)
def _same_environment_after():
    """``comm.init`` sets the launch variables: a test that calls it in this process must not leave them to others."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
