"""How the adapters start: the methods, their samples and their scales."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_one_dist.config.effect import Effect, not_with, only_with
from lora_one_dist.config.group import AsPath, Group

DEFAULT_GAMMA = {"lora_one": 128.0, "lora_one_v1": 64.0, "lora_ga": 16.0}
GRADIENT_METHODS = (*DEFAULT_GAMMA, "lora_sb")
COMPENSATED_METHODS = ("lora_one_v1", "lora_ga", "pissa")
_FROM_A_METHOD = only_with("init.adapter", None, otherwise="has no effect with init.adapter. Leave one of them out.")
_BY_GRADIENT = only_with("init.method", *GRADIENT_METHODS)
_BY_SVD = not_with("init.method", "lora")


class InitConfig(Group):
    """How the adapters start."""

    acts: ClassVar = (only_with("train.mode", "lora"),)

    method: Annotated[
        Literal["lora_one", "lora_one_v1", "lora_ga", "lora_sb", "pissa", "lora"],
        _FROM_A_METHOD,
        Effect(
            ("init.method", "lora.kind"),
            lambda method, kind: method != "lora_sb" or kind == "lora_sb",
            "= lora_sb is where a core starts. Set lora.kind to lora_sb too.",
        ),
    ] = "lora_one"
    """lora_one: arXiv 2502.01235v3; lora_one_v1: its first form; lora_ga: arXiv 2407.05000; lora_sb: arXiv 2411.19557;
    pissa: arXiv 2404.02948; lora: Kaiming A, zero B."""
    adapter: Annotated[str | None, AsPath] = None
    """PEFT folder to start from instead of a method."""
    num_samples: Annotated[int, _FROM_A_METHOD, _BY_GRADIENT] = Field(8, ge=1)
    """Training samples in the one-step gradient, at least 1; the authors take 8."""
    micro_batch_size: Annotated[int | None, _FROM_A_METHOD, _BY_GRADIENT] = Field(None, ge=1)
    """Samples per forward pass and rank in the gradient phase, at least 1; none: train.micro_batch_size. It matters to
    the result with average micro_batch alone."""
    average: Annotated[Literal["token", "micro_batch"], _FROM_A_METHOD, _BY_GRADIENT] = "token"
    """token: mean over all target tokens; micro_batch: mean of the micro-batches' means, as the authors do."""
    gamma: Annotated[float | None, _FROM_A_METHOD, only_with("init.method", *DEFAULT_GAMMA)] = Field(None, gt=0)
    """Scale of the initial adapters (larger is smaller), above 0; default 128 lora_one, 64 lora_one_v1, 16 lora_ga."""
    buffer: Annotated[Literal["device", "host"], _FROM_A_METHOD, _BY_SVD] = "device"
    """Where an owner keeps the fp32 gradients of its layers between the backward passes and the SVDs."""
    layer_groups: Annotated[int, _FROM_A_METHOD, _BY_SVD] = Field(1, ge=1)
    """Passes over the same batch, each for 1/K of the layers: owner memory divided by K, for K forward passes and
    (K + 1) / 2 backward."""
    halves: Annotated[bool, _FROM_A_METHOD, _BY_GRADIENT] = False
    """Report the overlap of the top-r spaces of the batch's two halves: do the samples suffice? Costs twice the owner's
    gradient memory, three SVDs a layer instead of one, and a second pass where one micro-batch a rank would do."""
    svd_tolerance: Annotated[float, _FROM_A_METHOD, _BY_SVD] = Field(1e-3, gt=0, le=0.1)
    """Certified error of a top space above which its SVD iterates further, in (0, 0.1]; a wide bound on the angle."""
