"""A model's own code, run before a weight is read: does it run on text, predict the next token, may blocks run again?

In: a skeleton.  Out: nothing, a note where the model cannot be asked, or a refusal.  The skeleton itself is left alone:
a copy with thin weights (:mod:`thin`) runs 12 tokens in fp32 on the CPU, at its real widths, three blocks of each kind.
Runs on every rank, not collective.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map_only

from lora_one_dist.base import varlen
from lora_one_dist.base.blocks import has_encoder, parts, stacks
from lora_one_dist.base.dropout import dropout_off
from lora_one_dist.base.graph import begin_at_embeddings, input_embedding
from lora_one_dist.base.products import freeze_products
from lora_one_dist.base.recompute import most_blocks, recompute_blocks, refuse_kept
from lora_one_dist.base.skeleton import ModelError, cause_of
from lora_one_dist.base.thin import SEED, ThinProducts, fill_thinly
from lora_one_dist.base.two_stacks import decoder_inputs, pad_token
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import ModelConfig

KEPT = (
    3  # blocks of a kind: one may hand another what is not its output; ProphetNet's see later tokens from the third on
)
NUMBERS = ("layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing")
SCANNED = 4  # tokens in a chunk
TOKENS = 12
CHANGED = 6  # from this one on
PADS = 4
REMEDY = (
    "a model that predicts the next token of a text; of some types that is one with is_decoder: true in its "
    "config.json."
)
EQUAL = 1e-4  # of the largest: over all dense models of transformers 5.23 it was 0, once 1e-5, or above 0.2


def rehearse(skeleton: Any, config: ModelConfig) -> str | None:
    """Refuse a model whose code asks for more than text, whose logits see later tokens, or whose gradient is another
    where blocks run again.

    Args:
        skeleton: from :func:`~lora_one_dist.base.skeleton.build_skeleton`.

    Returns:
        What could not be asked, and why; or None.

    Raises:
        ModelError: naming value, rule and remedy.
    """
    refuse_kept(skeleton, config.recompute)
    value = f"model.path = {config.path}: its model_type = {skeleton.config.model_type!r}"
    try:
        cause: str | None = _ask(skeleton, config, value, shortened=True)
    except ModelError as refusal:
        cause = str(refusal)  # as it would be with all of its blocks?
    if cause:
        cause = _ask(skeleton, config, value, shortened=False)
    return cause and f"whether {type(skeleton).__name__} is causal, and may recompute, could not be checked: {cause}"


def _ask(skeleton: Any, config: ModelConfig, value: str, shortened: bool) -> str | None:
    """Raise ModelError, or say why the model could not be asked (None if it could)."""
    model = _prepared(skeleton, shortened)
    try:
        with _rehearsing(model):
            one, other = _both(model)
    except Exception as error:  # a model's own code may fail in any way
        return _refuse_failing(model, error, value)
    cause = _refuse_not_causal(one, other, value)
    if cause is not None:
        return cause
    if has_encoder(model):
        _refuse_without_start(model, value)
        with _rehearsing(model):
            _refuse_seen_pads(model, value)
    may_recompute = config.recompute not in ("none", 0) and most_blocks(model) > 0
    with _rehearsing(model):
        return _refuse_wrong_gradient(model, config.checkpointing if may_recompute else None, value)


def _refuse_failing(model: Any, error: Exception, value: str) -> str:
    """Raise ModelError, or say why a run may yet do what failed here.

    What fails on a CPU says nothing of kernels for a GPU, and code of the folder's own may take thin weights amiss.
    """
    cause = f"{type(error).__name__}: {cause_of(error)}"
    if comm.device().type == "cpu" and type(model).__module__.startswith("transformers."):
        raise ModelError(f"{value} does not run on text alone ({cause}). Give {REMEDY}") from error
    return f"its code does not run by itself ({cause})"


@contextlib.contextmanager
def _rehearsing(model: Any) -> Iterator[None]:
    """As a run goes, but for products of large weights; the generators of the process are left as they were."""
    with ThinProducts(), dropout_off(model), torch.random.fork_rng(devices=[]):
        yield


def _both(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two rows of tokens that differ from CHANGED on."""
    first = _tokens(model)
    second = first.clone()
    second[:, CHANGED:] = first.roll(1, 1)[:, CHANGED:]
    with torch.no_grad():
        return _logits(model, first), _logits(model, second)


def _refuse_without_start(model: Any, value: str) -> None:
    """Raise ModelError if nothing says with which token a decoder begins, or with which completions are padded."""
    try:
        decoder_inputs(model, _tokens(model))
    except Exception as error:  # each type has its own way
        raise ModelError(
            f"{value} does not say what its decoder begins with ({cause_of(error)}). Set decoder_start_token_id and "
            "pad_token_id in its config.json."
        ) from error


def _refuse_seen_pads(model: Any, value: str) -> None:
    """Raise ModelError if pads behind a prompt, which the mask names, or behind its completion change the logits."""
    ids = _tokens(model)
    padded = nn.functional.pad(ids, (0, PADS), value=pad_token(model))
    mask = (torch.arange(TOKENS + PADS) < TOKENS).long()[None]
    with torch.no_grad():
        plain = _logits(model, ids)
        both = {
            "prompt": _logits(model, ids, input_ids=padded, attention_mask=mask),
            "completion": _logits(model, padded)[:, :TOKENS],
        }
    for what, beside in both.items():
        difference = float((beside - plain).abs().max() / plain.abs().max())
        if difference > EQUAL:
            raise ModelError(
                f"{value} sees the padding of a {what}: with {PADS} pads the logits change by {difference:.2g} of the "
                "largest, so that a sample's loss would depend on what shares its micro-batch. Give a model that masks "
                "it."
            )


def _refuse_not_causal(one: torch.Tensor, other: torch.Tensor, value: str) -> str | None:
    """Raise ModelError, or say why these logits tell nothing (None if they do)."""
    change = (one - other).abs()
    after, before = float(change[:, CHANGED:].max()), float(change[:, :CHANGED].max())
    if not (one.isfinite().all() and other.isfinite().all() and after > 0):
        return "with random weights its logits are not finite, or the same for all tokens"
    if before > EQUAL * after:
        raise ModelError(
            f"{value} sees the tokens that it is to predict: other tokens from position {CHANGED} on change the logits "
            f"before it by {before / after:.2g} of what they change behind it. Give {REMEDY}"
        )
    return None


def _refuse_wrong_gradient(model: Any, kind: str | None, value: str) -> str | None:
    """Raise ModelError, or say why the gradient tells nothing (None if it does).

    Args:
        kind: of checkpointing, if any may be.
    """
    ids = _tokens(model)
    freeze_products(model)
    begin_at_embeddings(model)
    recompute_blocks(model, 0, False)
    try:
        with _in_backward() as ran:
            kept = _gradient(model, ids)
    except Exception as error:
        return _refuse_failing(model, error, value)
    if ran:
        raise ModelError(
            f"{value} runs its layers again in a backward pass of its own ({ran[0]} first), where ZeRO-3 has let go of "
            "their weights. Give another model."
        )
    if not (kept.isfinite().all() and kept.any()):
        return "with random weights its gradient is not finite, or zero"
    if kind is not None:
        _refuse_wrong_again(model, kind, ids, kept)
    return None


def _refuse_wrong_again(model: Any, kind: str, ids: torch.Tensor, kept: torch.Tensor) -> None:
    """Raise ModelError if the gradient is not the one that was ``kept`` where blocks are computed again."""
    other = "non_reentrant" if kind == "reentrant" else "reentrant"
    remedy = f"Set model.recompute: none, or model.checkpointing: {other}."
    setting = f"model.checkpointing = {kind}: {type(model).__name__}"
    try:
        recompute_blocks(model, most_blocks(model), kind == "reentrant")
        again = _gradient(model, ids)
    except Exception as error:
        raise ModelError(f"{setting} cannot compute its blocks again ({cause_of(error)}). {remedy}") from error
    difference = float((again - kept).abs().max() / kept.abs().max())
    if not difference <= EQUAL:
        raise ModelError(
            f"{setting} has another gradient where its blocks are computed again, off by {difference:.2g}: they share "
            f"more than their inputs and outputs. {remedy}"
        )


@contextlib.contextmanager
def _in_backward() -> Iterator[list[str]]:
    """Collect the types of modules that run while autograd goes back."""
    ran: list[str] = []

    def watch(layer: nn.Module, inputs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            ran.append(type(layer).__name__)

    handle = register_module_forward_pre_hook(watch)
    try:
        yield ran
    finally:
        handle.remove()


def _gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a weighted sum of the logits, at the embeddings."""
    found: list[torch.Tensor] = []
    with _at_embedding(model, found):
        logits = _logits(model, ids)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(SEED))
        (logits * weights).sum().backward()
    return found[0]


@contextlib.contextmanager
def _at_embedding(model: Any, found: list[torch.Tensor]) -> Iterator[None]:
    """Collect the gradient of the embeddings' output; an encoder's and a decoder's one behind the other."""
    by_call: dict[int, torch.Tensor] = {}
    calls = itertools.count()

    def watch(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        call = next(calls)
        output.register_hook(lambda gradient: by_call.__setitem__(call, gradient))

    owners = parts(model) if has_encoder(model) else (model,)
    layers = {input_embedding(owner) for owner in owners} - {None}
    handles = [layer.register_forward_hook(watch) for layer in layers if layer is not None]
    try:
        yield
        found.append(torch.cat([by_call[call].flatten() for call in sorted(by_call)]))
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: Any, ids: torch.Tensor, **prompt: torch.Tensor) -> torch.Tensor:
    """Of ids; a decoder's, beside a ``prompt`` that is always the same."""
    torch.manual_seed(SEED)  # whatever its code draws by chance, it draws again
    given = {"input_ids": ids}
    if has_encoder(model):
        given = {"input_ids": _tokens(model), **prompt, "decoder_input_ids": ids}
    logits: torch.Tensor = model(**given, use_cache=False).logits
    return logits


def _prepared(skeleton: Any, shortened: bool) -> Any:
    """A copy with values; by an attention that needs no GPU, since who sees whom is decided before it."""
    model = copy.deepcopy(skeleton)
    fill_thinly(model)
    if str(model.config._attn_implementation).startswith(("flash", varlen.NAME)):
        model.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(getattr(module, "chunk_size", None), int):  # of a scan: what it comes to is the same
            module.chunk_size = min(module.chunk_size, SCANNED)
    if shortened:
        skip_repeated(model)
    return model


def skip_repeated(model: nn.Module) -> None:
    """Let all blocks of a kind but its first KEPT hand on what they are given.  Pure.

    Two blocks are of a kind if their modules, and these modules' settings, are the same but for the layer's number.
    """
    for stack in stacks(model):
        seen: dict[str, list[nn.Module]] = {}
        for block in stack:
            if not any(True for _ in block.children()):
                continue  # a list of embeddings or heads
            like = seen.setdefault(_kind(block), [])
            if len(like) < KEPT:
                like.append(block)
            else:
                _skip(block, like[0])


def _kind(block: nn.Module) -> str:
    settings = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and key not in NUMBERS
    ]
    return f"{block!r} {settings}"


def _skip(block: Any, like: nn.Module) -> None:
    """Give back the first input, in the form in which another block gives back its output."""
    shown: list[Any] = []
    like.register_forward_hook(lambda layer, inputs, output: shown.__setitem__(slice(None), [output]))

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        # Copies: a checkpoint writes its graph into what it gives back, which must not be what it closes over.
        hidden, form = (args[0] if args else kwargs["hidden_states"]).clone(), shown[-1]
        if not isinstance(form, (tuple, list)):
            return hidden
        return type(form)([hidden, *tree_map_only(torch.Tensor, torch.Tensor.detach, list(form[1:]))])

    block.forward = hand_on


def _tokens(model: Any) -> torch.Tensor:
    """(1, TOKENS) ids that are all different, none of which the config names: a pad, the place of an image."""
    rows = model.get_input_embeddings().num_embeddings
    named = [value for key, value in model.config.to_dict().items() if key.endswith(("token_id", "token_index"))]
    special = {number for value in named for number in (value if isinstance(value, list) else [value])}
    plain = [number for number in range(min(rows, 512)) if number not in special]
    chosen = torch.randperm(len(plain), generator=torch.Generator().manual_seed(SEED))[:TOKENS]
    return torch.tensor([[plain[i % len(plain)] for i in chosen.tolist()]])
