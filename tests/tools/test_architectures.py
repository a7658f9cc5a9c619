"""Families that people train, each by transformers' own code: a run of two steps against plain autograd and PEFT."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tools.architectures import matrix, one

FAMILIES = (
    *("apertus", "bloom", "cohere2", "exaone4", "falcon", "falcon_h1", "gemma2", "gemma3", "gemma3n_text", "gemma4"),
    *("glm4", "gpt2", "gpt_neox", "granite", "lfm2", "llama", "llava", "mistral", "mistral3", "nemotron"),
    *("olmo2", "phi3", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_5", "qwen3_vl", "smollm3", "stablelm", "starcoder2"),
)


@pytest.mark.full
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_trains(kind, tmp_path):
    folder = tmp_path / kind
    folder.mkdir()
    found = one.build(folder)
    assert "reason" not in found
    for ranks in matrix.RANKS:
        told = run_ranks(ranks, one.train, folder, ranks, init=False)[0]
        assert "reason" not in told, told
        found |= told
    assert matrix.verdict(found | one.compare(folder)) == "works, slices"
