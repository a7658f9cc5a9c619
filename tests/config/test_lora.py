"""Patterns of ranks and scales, and that PEFT reads those that are written as they were meant."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from lora_one_dist.config.lora import LoraConfig, patterns_for


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        ({"a.q": 8, "a.k": 8}, {}, {}),
        ({"a.q": 2, "a.k": 8}, {"q": 2}, {"q": 2}),
        ({"a.q": 2, "a.k": 4}, {"q": 2}, {"q": 2, "k": 4}),  # k was too narrow
        ({"a.q": 2, "a.k": 4}, {"q": 2, "k": 16}, {"q": 2, "k": 4}),
        ({"a.q": 16, "a.k": 4}, {"(q|k)": 16}, {"q": 16, "k": 4}),  # "(q|k)" comes first in what PEFT saves
        ({"a.q": 2, "b.q": 8}, {"a.q": 2}, {"a.q": 2}),
        ({"a.q": 2, "b.q": 8}, {}, {r"^a\.q": 2}),
        ({"a.q": 2, "b.q": 4}, {"b.q": 4, ".*q": 2}, {r"^a\.q": 2, r"^b\.q": 4}),  # in the other order q is 2 in both
        ({"q": 2, "a.q": 4}, {}, {"^q": 2, r"^a\.q": 4}),
    ],
)
def test_patterns_hold_in_the_order_in_which_peft_saves_them(wanted, given, expected):
    found = patterns_for(wanted, 8, given)
    assert found == expected
    for order in (sorted(found), list(found)):
        assert {name: found.get(get_pattern_key(order, name), 8) for name in wanted} == wanted


@pytest.mark.parametrize("name", ["q", "a.q", "a.xq", "b.a.q", "a.q.b", "model.layers.1.q", "model.layers.11.q"])
@pytest.mark.parametrize("pattern", ["q", "a.q", ".q", "^a.q", "x?q", r"layers\.1\.q", "b|q", ".*", "aq"])
def test_a_pattern_means_what_it_means_to_peft(pattern, name):
    expected = 3 if get_pattern_key([pattern], name) == pattern and name != pattern else None
    if name == pattern:  # PEFT answers with the name where nothing matches; here it does
        expected = 3
    lora = LoraConfig(r=5, alpha=7, rank_pattern={pattern: 3}, alpha_pattern={pattern: 2})
    assert lora.rank_asked(name) == (expected or 5)
    assert lora.alpha_of(name) == (2 if expected else 7)
