"""A part of tests/kill_harness.py: killed runs that were started again end as if nothing had been."""

from __future__ import annotations

import pytest

from tests import kill_harness
from tests.kill_harness import POINTS, SHORT, Harness


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize(("name", "everyone"), SHORT)
def test_run_killed_at_a_point_goes_on_to_the_same_bits(name, everyone, harness):
    trial = harness.at_point(POINTS[name], everyone)
    assert trial.faults == []


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.full)])
def test_run_killed_at_a_random_moment_goes_on_to_the_same_bits(number, harness):
    harness.reference("lora_one")
    # A seed with late moments: where a rank dies before all have met, the other waits RENDEZVOUS_SECONDS for it.
    name, moments = kill_harness.random_moments(2, harness.seconds, seed=6)[number]
    trial = harness.at_moments(name, moments)
    assert trial.faults == []
