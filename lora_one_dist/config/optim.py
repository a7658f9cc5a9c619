"""The update of what is trained: optimizer, preconditioner, schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_one_dist.config.effect import Effect, not_with, only_with
from lora_one_dist.config.group import Group

PAIR_KINDS = ("lora", "dora")  # whose A and B train, as the preconditioner has them
DEFAULT_FORM = {"adamw": "rescaled", "sgd": "riemannian"}
DEFAULT_DAMPING = {"rescaled": 1.0, "riemannian": 1e-6, "lora_pro": 1e-8, "none": None}
Decay = Annotated[float, Field(ge=0, lt=1)]
_OF_ADAPTERS = only_with("train.mode", "lora")


class OptimConfig(Group):
    """The update of what is trained."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay and bias correction; sgd: plain, decoupled weight decay."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate, above 0."""
    lr_ratio_b: Annotated[float, _OF_ADAPTERS, not_with("lora.kind", "lora_sb")] = Field(1.0, gt=0)
    """LoRA+ (arXiv 2402.12354): learning rate of lora_B over that of lora_A; 1 is plain LoRA."""
    betas: Annotated[tuple[Decay, Decay], only_with("optim.name", "adamw")] = (0.9, 0.999)
    """AdamW's moment decays, each in [0, 1)."""
    eps: Annotated[float, only_with("optim.name", "adamw")] = Field(1e-8, gt=0)
    """AdamW's epsilon, above 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, at least 0."""
    preconditioner: Annotated[
        Literal["rescaled", "riemannian", "lora_pro", "none"] | None,
        _OF_ADAPTERS,
        only_with("lora.kind", *PAIR_KINDS),
        Effect(
            ("optim.preconditioner", "lora.kind"),
            lambda form, kind: form != "lora_pro" or kind == "lora",
            "= lora_pro is for lora.kind lora. Set one of them back.",
        ),
    ] = None
    """riemannian: gA <- (B'B + damping I)^-1 gA, gB <- gB (AA' + damping I)^-1 (arXiv 2402.02347), as in LoRA-One's
    paper. rescaled: then scaled to the raw gradient's norm, matrix by matrix, which AdamW's moments need, and fading
    with the rate (results/defaults). lora_pro: both adjusted to what full fine-tuning would change (arXiv 2407.18242),
    with AdamW's moments of whole weights on their owners. Default: rescaled with adamw, riemannian with sgd."""
    damping: Annotated[
        float | None,
        _OF_ADAPTERS,
        not_with("optim.preconditioner", "none"),
        not_with(
            "optim.preconditioner", None, otherwise="needs optim.preconditioner beside it: its unit depends on it."
        ),
    ] = Field(None, gt=0)
    """The preconditioner's damping, above 0. rescaled: in units of the Gram's mean eigenvalue, at the peak rate (it
    grows as the rate falls), default 1; riemannian: as it is, default 1e-6, values in papers span 1e-6 to 100;
    lora_pro: as it is, default 1e-8."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the raw gradient's global norm, before the preconditioner; 0: do not clip."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up: linear or cosine to 0 at the last step, or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0, at least 0."""

    @property
    def form(self) -> str:
        """The preconditioner in force: as given, or the optimizer's own default."""
        return self.preconditioner or DEFAULT_FORM[self.name]

    @property
    def moments_of_weights(self) -> bool:
        """Are AdamW's moments those of whole weights (LoRA-Pro), not of pairs?"""
        return self.form == "lora_pro" and self.name == "adamw"

    @property
    def damping_in_force(self) -> float | None:
        """``damping``, or the default of the preconditioner in force; without one: None."""
        return self.damping if self.damping is not None else DEFAULT_DAMPING[self.form]
