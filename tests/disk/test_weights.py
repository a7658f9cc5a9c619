"""Safetensors files by byte offset: what their headers give, and those that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from lora_one_dist.base import sharding
from lora_one_dist.disk import weights


@pytest.fixture
def tensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = {
        "matrix": torch.randn(37, 11, generator=generator),
        "half": torch.randn(5, 7, generator=generator).bfloat16(),
        "vector": torch.randn(13, generator=generator),
        "integers": torch.arange(4),
    }
    path = tmp_path / "model.safetensors"
    save_file(values, path, metadata={"format": "pt"})
    return values, path


def whole(source):
    """A tensor as its own only part."""
    return weights.Part(source, 0, math.prod(source.shape), 0)


def test_header_gives_types_shapes_and_places(tensors):
    values, path = tensors
    sources = weights.read_header(path)
    assert set(sources) == set(values)
    assert sources["integers"].kind not in weights.BASE_DTYPES
    for name in ("matrix", "half", "vector"):
        assert (sources[name].dtype, sources[name].shape) == (values[name].dtype, tuple(values[name].shape))
        parameter = torch.nn.Parameter(torch.zeros_like(values[name]), requires_grad=False)
        with path.open("rb") as file:
            sharding._read_own(parameter, [whole(sources[name])], {path: file})
        assert torch.equal(parameter, values[name])


@pytest.mark.parametrize("fault", ["cut", "longer", "text", "empty"])
def test_broken_files_are_refused(fault, tensors):
    _, path = tensors
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-5], "longer": content + b"x", "text": b"not a tensor file", "empty": b""}[fault])
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors"):
        weights.read_header(path)
