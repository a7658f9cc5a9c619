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
_BY_LORA_GA = only_with("init.method", "lora_ga")
_NOT_DRAWN = Effect(("init.scheme", "init.method"), lambda scheme, method: (method, scheme) != ("lora_ga", "random"))
_BY_GAMMA = Effect(("init.stable_output", "init.method"), lambda stable, method: stable or method != "lora_ga")


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
    scheme: Annotated[Literal["arb2r", "arbr", "a2rbr", "random"], _FROM_A_METHOD, _BY_LORA_GA] = "arb2r"
    """Which singular vectors lora_ga gives to A and to B. arb2r: 1..r and r+1..2r; a2rbr: r+1..2r and 1..r; arbr: the
    even and the odd ones of 1..2r; random: orthonormal directions drawn from train.seed, without a gradient."""
    stable_output: Annotated[bool, _FROM_A_METHOD, _BY_LORA_GA] = True
    """Scale of lora_ga's A and B: true m^(1/4) / sqrt(gamma); false 1 / s, with which a gradient step of the adapters
    is one of the full gradient's rank-2r part at the same rate."""
    adapter: Annotated[str | None, AsPath] = None
    """PEFT folder to start from instead of a method."""
    num_samples: Annotated[int, _FROM_A_METHOD, _BY_GRADIENT, _NOT_DRAWN] = Field(8, ge=1)
    """Training samples in the one-step gradient, at least 1; the authors take 8."""
    micro_batch_size: Annotated[int | None, _FROM_A_METHOD, _BY_GRADIENT, _NOT_DRAWN] = Field(None, ge=1)
    """Samples per forward pass and rank in the gradient phase, at least 1; none: train.micro_batch_size. It matters to
    the result with average micro_batch alone."""
    average: Annotated[Literal["token", "micro_batch"], _FROM_A_METHOD, _BY_GRADIENT, _NOT_DRAWN] = "token"
    """token: mean over all target tokens; micro_batch: mean of the micro-batches' means, as the authors do."""
    gamma: Annotated[float | None, _FROM_A_METHOD, only_with("init.method", *DEFAULT_GAMMA), _BY_GAMMA] = Field(
        None, gt=0
    )
    """Scale of the initial adapters (larger is smaller), above 0; default 128 lora_one, 64 lora_one_v1, 16 lora_ga."""
    buffer: Annotated[Literal["device", "host"], _FROM_A_METHOD, _BY_SVD, _NOT_DRAWN] = "device"
    """Where an owner keeps the fp32 gradients of its layers between the backward passes and the SVDs."""
    layer_groups: Annotated[int, _FROM_A_METHOD, _BY_SVD, _NOT_DRAWN] = Field(1, ge=1)
    """Passes over the same batch, each for 1/K of the layers: owner memory divided by K, for K forward passes and
    (K + 1) / 2 backward."""
    halves: Annotated[bool, _FROM_A_METHOD, _BY_GRADIENT, _NOT_DRAWN] = False
    """Report the overlap of the top-r spaces of the batch's two halves: do the samples suffice? Costs twice the owner's
    gradient memory, three SVDs a layer instead of one, and a second pass where one micro-batch a rank would do."""
    svd_tolerance: Annotated[float, _FROM_A_METHOD, _BY_SVD, _NOT_DRAWN] = Field(1e-3, gt=0, le=0.1)
    """Certified error of a top space above which its SVD iterates further, in (0, 0.1]; a wide bound on the angle."""

    @property
    def takes_gradient(self) -> bool:
        """Do the adapters start from the one-step gradient?"""
        return self.method in GRADIENT_METHODS and (self.method, self.scheme) != ("lora_ga", "random")

    @property
    def takes_svd(self) -> bool:
        """Do they start from the SVD of a gradient or of a weight?"""
        return self.takes_gradient or self.method == "pissa"

    @property
    def has_gamma(self) -> bool:
        """Does gamma set their scale?"""
        return self.method in DEFAULT_GAMMA and (self.stable_output or self.method != "lora_ga")
