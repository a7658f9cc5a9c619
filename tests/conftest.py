"""One thread per process: reductions in one order, and ranks that do not fight for cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its pool
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on CPU ranks, also on a machine with GPUs
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
import torch

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
