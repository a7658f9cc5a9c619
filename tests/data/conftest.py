"""Fixtures of this room's tests."""

from __future__ import annotations

import pytest

from tests.data.helpers import build_tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of `datasets` of this session's own, and no network."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()
