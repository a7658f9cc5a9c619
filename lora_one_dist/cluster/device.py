"""This rank's GPU, if there are any: which one, in which precision it multiplies, and that its network is ready.

In: the launch, and process groups.  Out: the backend; or an error that says what is in the way.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lora_one_dist.cluster.launchers import Launch, LaunchError

SHARED = "LORA_ONE_SHARED_GPU"  # 1: ranks share the first GPU over gloo, for tools/gpu: NCCL wants one for each


def pick(launch: Launch) -> str:
    """Set this rank's GPU and its precision.  Returns the backend.  Not collective.

    Raises:
        LaunchError: naming the variable or the number of GPUs that is in the way.
    """
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise LaunchError(f"DS_ACCELERATOR = {accelerator!r}: must be cuda or cpu. Unset it: torch tells which.")
    # Some containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: fp32 products would keep 10 bits, and no SVD be certified.
    torch.set_float32_matmul_precision("highest")
    if not torch.cuda.is_available():
        if accelerator == "cuda":
            raise LaunchError("DS_ACCELERATOR = cuda: torch sees no GPU here. Unset it, or look at nvidia-smi.")
        return "gloo"
    if accelerator == "cpu":
        raise LaunchError("DS_ACCELERATOR = cpu, but torch sees GPUs. Hide them: CUDA_VISIBLE_DEVICES= (empty).")
    if os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "0":  # cuBLAS reads it itself: torch cannot undo it
        raise LaunchError(
            f"NVIDIA_TF32_OVERRIDE = {os.environ['NVIDIA_TF32_OVERRIDE']}: fp32 products would keep 10 of 23 bits, and "
            "the SVDs need all. Unset it; bf16 products, which are nearly all, are as fast without."
        )
    if os.environ.get(SHARED) == "1":
        torch.cuda.set_device(0)
        return "gloo"
    if launch.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {launch.local_rank} on {socket.gethostname()}: {torch.cuda.device_count()} GPUs visible. "
            "Start at most one rank per GPU, and let each see all of its host's (srun: --gpus-per-node, not "
            "--gpus-per-task)."
        )
    torch.cuda.set_device(launch.local_rank)
    return "cpu:gloo,cuda:nccl"


def connect(groups: Mapping[str, Any]) -> None:
    """Let NCCL build what it needs for each process group now: its memory is taken, and a network that fails is told.

    Collective among each group's ranks.  NCCL would else connect at the first use, in the middle of a backward pass,
    from memory that torch may have taken by then.

    Raises:
        LaunchError: naming the group.
    """
    for name, group in groups.items():
        ranks = dist.get_world_size(group)
        try:
            dist.all_reduce(torch.ones(1, device="cuda"), group=group)
            dist.all_to_all_single(torch.empty(ranks, device="cuda"), torch.ones(ranks, device="cuda"), group=group)
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise LaunchError(
                f"NCCL cannot connect the {ranks} ranks of {name} ({socket.gethostname()}): {str(error)[:300]}. "
                "NCCL_DEBUG=INFO shows the networks that it tries, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose them; "
                "python tools/doctor.py looks at the hosts."
            ) from error
