"""The adapters' settings, and PEFT's rules of which layers a name or a pattern means.  Pure."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from lora_one_dist.config.effect import Effect, only_with
from lora_one_dist.config.group import Group

Value = TypeVar("Value")
PEFT_EPSILON = 1e-5  # that PEFT's AdaLoRA adds to r
_ADALORA = only_with("lora.kind", "adalora")


def matches(pattern: str, name: str) -> bool:
    """Does a key of ``rank_pattern`` or ``alpha_pattern`` mean this module?  (peft.utils.other.get_pattern_key)"""
    return _compiled(pattern).match(name) is not None


@functools.cache  # re keeps 512: too few for patterns that name each layer of a large model
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def by_pattern(patterns: Iterable[tuple[str, Value]], name: str, default: Value) -> Value:
    """The value of the first pattern that means this module."""
    return next((value for pattern, value in patterns if matches(pattern, name)), default)


def ends(ending: str, name: str) -> bool:
    """Does an item of ``target_modules`` or ``exclude_modules`` mean this module?"""
    return name == ending or name.endswith(f".{ending}")


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
        _compiled(pattern)
    except re.error as error:
        fault = {"pattern": repr(pattern), "error": str(error)}
        raise PydanticCustomError("expression", "{pattern} is no regular expression ({error})", fault) from error
    return pattern


Expression = Annotated[str, AfterValidator(_expression)]


class LoraConfig(Group):
    """Shape of the adapters, in PEFT's terms."""

    acts: ClassVar = (only_with("train.mode", "lora"),)

    r: int = Field(8, ge=1)
    """The LoRA rank, at least 1 and at most min(out_features, in_features) of a target; a narrower target has as many
    as it can. Typical 8 to 64."""
    alpha: float = Field(16.0, gt=0)
    """Scale: s = alpha / r, or alpha / sqrt(r) with use_rslora. Above 0."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training, in [0, 1); always off in the gradient phase."""
    use_rslora: bool = True
    """s = alpha / sqrt(r) (arXiv 2312.03732), as in the LoRA-One recipes."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """all-linear, or a list of module name endings, e.g. [q_proj, v_proj]. all-linear is every linear layer but the
    output head, routers, gates of width 1, and what text does not run: towers of images, weights that others read."""
    exclude_modules: list[str] | Expression | None = None
    """Of these, layers to leave out: a list of module name endings, or a regular expression of whole names."""
    rank_pattern: dict[Expression, Annotated[int, Field(ge=1, strict=True)]] = Field(default_factory=dict)
    """Another r, at least 1, for layers whose name ends in what a regular expression matches, e.g. {v_proj: 16}; the
    first that matches counts."""
    alpha_pattern: dict[Expression, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Another alpha, above 0, for layers, as in rank_pattern."""
    kind: Annotated[
        Literal["lora", "dora", "lora_sb", "adalora"],
        Effect(
            ("lora.kind", "init.method", "init.adapter"),
            lambda kind, method, adapter: kind != "lora_sb" or method == "lora_sb" or adapter is not None,
            "= lora_sb needs the core's own start. Set init.method to lora_sb too.",
        ),
        Effect(
            ("lora.kind", "lora.use_rslora", "init.method", "init.adapter"),
            lambda kind, root, method, adapter: kind != "adalora" or (root, method, adapter) == (False, "lora", None),
            "= adalora starts at random and divides alpha by r. Set init.method to lora and lora.use_rslora to false, "
            "and leave init.adapter out.",
        ),
    ] = "lora"
    """lora: A and B train; dora (arXiv 2402.09353): so does the magnitude of each row of W + s B A; lora_sb (arXiv
    2411.19557, with init.method lora_sb): the r x r core R of W + s B R A alone trains; adalora (arXiv 2303.10512, with
    init.method lora, without use_rslora): A, B and E of W + s B diag(E) A, of which the least important triplets go."""
    adalora_target_r: Annotated[int | None, _ADALORA] = Field(None, ge=1)
    """Triplets that a layer keeps on average, at least 1, below r (PEFT: target_r, where r is init_r); none: two thirds
    of r, as in the paper."""
    adalora_warmup_steps: Annotated[int, _ADALORA] = Field(0, ge=0)
    """Optimizer steps before the first triplets go (PEFT: tinit), at least 0."""
    adalora_final_steps: Annotated[int, _ADALORA] = Field(0, ge=0)
    """Optimizer steps at the end in which the triplets that stay are the same (PEFT: tfinal), at least 0."""
    adalora_interval: Annotated[int, _ADALORA] = Field(1, ge=1)
    """Optimizer steps between two prunings (PEFT: deltaT), at least 1."""
    adalora_orthogonal: Annotated[float, _ADALORA] = Field(0.5, ge=0)
    """Weight of the regulariser that keeps A's rows and B's columns orthogonal (PEFT: orth_reg_weight), at least 0. Its
    gradient counts in the norm that is clipped; the loss in the log is without it."""
    new_tokens: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Tokens to add to the tokenizer, e.g. ["<think>", "</think>"], of which embedding and head train a row each, from
    the mean of the old ones; so they do, unasked, of tokens that the tokenizer has and the model has not."""
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = None
    """Tables to train whole, all rows: the embedding, the output head, or both, e.g. [embed_tokens, lm_head], by
    endings of their names. Tied ones are trained as one."""

    def scale(self, r: int, alpha: float) -> float:
        """s in W + s B A: alpha / r, or alpha / sqrt(r) under rsLoRA; AdaLoRA's to the bit as PEFT has it."""
        if self.kind == "adalora":
            return alpha / (r + PEFT_EPSILON)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    @property
    def target_r(self) -> int:
        """AdaLoRA's in force."""
        return self.adalora_target_r or max(1, 2 * self.r // 3)

    def no_room_to_prune(self, steps: str) -> str:
        """What is wrong with a schedule without steps between its two ends; ``steps``: how many there are."""
        ends = f"{self.adalora_warmup_steps}, lora.adalora_final_steps = {self.adalora_final_steps}"
        return f"lora.adalora_warmup_steps = {ends}: must leave steps between them, {steps}. Lower them."

    def rank_asked(self, name: str) -> int:
        """r for the layer of this name, whatever its shape."""
        return by_pattern(self.rank_pattern.items(), name, self.r)

    def alpha_of(self, name: str) -> float:
        """alpha of the layer of this name."""
        return by_pattern(self.alpha_pattern.items(), name, self.alpha)

    def excludes(self, name: str) -> bool:
        """Does ``exclude_modules`` name this module?  (peft.tuners.tuners_utils.check_target_module_exists)"""
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, name) is not None
        return any(ends(ending, name) for ending in self.exclude_modules or ())


def patterns_for(wanted: Mapping[str, Value], default: Value, given: Mapping[str, Value]) -> dict[str, Value]:
    """Patterns that mean ``wanted`` by layer in whatever order they are read: PEFT saves them sorted, and the first
    that matches counts.

    Those ``given`` where they do; else with the last parts of the names of layers that they do not give their value;
    else such parts alone; else a whole name for each layer that differs from the default.
    """

    def missed(patterns: Mapping[str, Value]) -> list[str]:
        read = sorted(patterns.items())
        return [name for name, value in wanted.items() if by_pattern(read, name, default) != value]

    def by_part(names: Iterable[str]) -> dict[str, Value]:
        return {re.escape(name.rpartition(".")[2]): wanted[name] for name in names}

    differing = [name for name, value in wanted.items() if value != default]
    whole = {f"^{re.escape(name)}": wanted[name] for name in differing}
    for patterns in (dict(given), {**given, **by_part(missed(given))}, by_part(differing)):
        if not missed(patterns):
            return patterns
    assert not missed(whole), f"patterns do not give {missed(whole)[:3]} their value"
    return whole
