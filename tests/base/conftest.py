"""Fixtures of this room's tests."""

from __future__ import annotations

import pytest

from tests import models


@pytest.fixture(scope="module")
def llama():
    return models.llama(layers=2)
