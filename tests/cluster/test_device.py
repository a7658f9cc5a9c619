"""Which GPU a rank takes, and what keeps it from one; torch is told that there are some."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.cluster import device
from lora_one_dist.cluster.launchers import Launch, LaunchError


def launch(local_rank: int = 1) -> Launch:
    return Launch("torchrun", local_rank, 4, local_rank, "127.0.0.1", 29500)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs; returns which was set."""
    taken: list[int] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_fp32_products_keep_all_bits_whatever_was_set_before(monkeypatch):
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device.pick(launch()) == "gloo"
    assert torch.get_float32_matmul_precision() == "highest"


def test_each_rank_takes_its_own(gpus, monkeypatch):
    assert device.pick(launch(1)) == "cpu:gloo,cuda:nccl"
    assert gpus == [1]
    monkeypatch.setenv(device.SHARED, "1")
    assert device.pick(launch(3)) == "gloo", "NCCL wants one for each"
    assert gpus == [1, 0]


@pytest.mark.parametrize(
    ("local_rank", "variables", "said"),
    [
        (2, {}, "2 GPUs visible. Start at most one rank per GPU"),
        (0, {"DS_ACCELERATOR": "cpu"}, "but torch sees GPUs"),
        (0, {"DS_ACCELERATOR": "xpu"}, "must be cuda or cpu"),
        (0, {"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE = 1: fp32 products would keep 10 of 23 bits"),
    ],
)
def test_what_is_in_the_way_is_named(local_rank, variables, said, gpus, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=said):
        device.pick(launch(local_rank))
    assert gpus == []


def test_no_gpu_is_refused_where_one_was_asked_for(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="torch sees no GPU here"):
        device.pick(launch())


def test_a_group_that_nccl_cannot_connect_is_named(monkeypatch):
    import torch.distributed as dist

    def broken(*_args, **_kwargs):
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(dist, "all_reduce", broken)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    with pytest.raises(
        LaunchError, match=r"cannot connect the 4 ranks of the job .*unhandled system error.*NCCL_DEBUG"
    ):
        device.connect({"the job": None})
