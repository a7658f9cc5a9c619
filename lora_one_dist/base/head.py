"""The output head and the loss behind it, for the rows that have a target alone: a prompt's logits are never made.

In: a model, its inputs, the rows with a target.  Out: the summed loss, or those rows' logits.  Collective under
stage 3, as the forward pass is.

The loss is taken in pieces (:class:`_HeadLoss`) where the head is a plain frozen layer and what the model does to its
logits is known: nothing, a soft cap, a factor.  The first pass of each model shows whether it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lora_one_dist.base.products import weight_gradient

LOSS_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of logits in fp32 at one time: what caches like; large products
TAIL_COPIES = 4  # of the logits, by autograd's way through a tail
CHECKED_ROWS = 2
Tail = Callable[[torch.Tensor], torch.Tensor]  # what a model does to its head's logits
_tails: WeakKeyDictionary[nn.Module, Tail | None] = WeakKeyDictionary()  # None: nothing that is known


def why_whole(model: Any) -> str | None:
    """Why the loss is not taken in pieces, as far as the passes so far tell; None if it is.  Pure."""
    head = model.get_output_embeddings()
    if not _is_plain(head):
        return "the output head is not a plain frozen layer"
    if not any(child is head for child in model.children()):  # its module's output would have no gradient: BERT
        return "the output head lies in a module of its own"
    if _tails.get(model, _same) is None:
        return "what the model does to its logits is not known here"
    return None


def loss_in_pieces(
    model: Any, inputs: Mapping[str, Any], rows: torch.Tensor, labels: torch.Tensor, weight: float
) -> torch.Tensor | None:
    """``weight`` times the summed cross-entropy at ``rows`` (k,) of the flattened batch, whose ``labels`` are (k,).

    None if it cannot be taken in pieces; the caller then takes it from :func:`rows_only`.  The same on all ranks, which
    run the same model.
    """
    if why_whole(model) is not None:
        return None
    head: Any = model.get_output_embeddings()
    is_known, candidates = model in _tails, _candidates(model.config.get_text_config())
    tail = _tails[model] if is_known else candidates[0]
    hidden: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []

    def take(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """In front of DeepSpeed's hooks: it shall not gather the head in backward, which has no need of it."""
        hidden.append(given[0].reshape(-1, given[0].shape[-1]))
        return given[0].detach()

    def forward(given: torch.Tensor) -> torch.Tensor:
        flat = hidden[-1]
        if flat.shape[0] != count_rows(inputs):  # of more than the next token: ProphetNet
            return nn.functional.linear(given, head.weight, head.bias)
        losses.append(_HeadLoss.apply(flat[rows], labels, weight, head.weight, head.bias, tail))
        if is_known:  # what the model's own code goes on with
            return flat.new_zeros(1, 1, head.weight.shape[0])
        with torch.no_grad():
            shown.append(nn.functional.linear(flat[:CHECKED_ROWS], head.weight, head.bias)[None])
        return shown[0].clone()

    handle = head.register_forward_pre_hook(take, prepend=True)
    head.forward = forward
    try:
        logits = model(**inputs).logits
    finally:
        del head.forward
        handle.remove()
    if not is_known:
        fitting = (c for c in candidates if len(shown) == 1 and _equal(c(shown[0]), logits))
        _tails[model] = next(fitting, None)
    if _tails[model] is tail:
        return losses[0]
    return loss_in_pieces(model, inputs, rows, labels, weight)


def count_rows(inputs: Mapping[str, Any]) -> int:
    """Tokens whose next is predicted, padding included: a decoder's, where there is an encoder.  Pure."""
    return int(inputs.get("decoder_input_ids", inputs["input_ids"]).numel())


def _is_plain(head: Any) -> bool:
    """Is it a frozen layer without an adapter or rows of its own?"""
    return isinstance(head, nn.Linear) and not isinstance(head, RowsHead) and not head.weight.requires_grad


def _equal(expected: torch.Tensor, logits: torch.Tensor) -> bool:
    return torch.allclose(expected.float(), logits.float(), rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def rows_only(model: Any, rows: torch.Tensor, tokens: int) -> Iterator[None]:
    """Let the head, if there is one that sees a row for each token, see these rows alone of a flattened batch of
    ``tokens``: logits (1, k, V)."""

    def select(head: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        flat = given[0].reshape(-1, given[0].shape[-1])
        return given if flat.shape[0] != tokens else (flat[rows][None], *given[1:])

    head = model.get_output_embeddings()
    if head is None or isinstance(head, nn.Embedding):  # the model's own code multiplies by another layer's weight
        yield
        return
    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _same(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _candidates(config: Any) -> list[Tail]:
    """What models of transformers do to their logits, by what their config says: most do nothing."""
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    found: list[Tail] = []
    if cap:
        found.append(lambda logits: torch.tanh(logits / cap) * cap)
    if divisor:
        found.append(lambda logits: logits / divisor)
    return [*found, *(lambda logits, factor=factor: logits * factor for factor in factors if factor), _same]


def cross_entropy(
    scores: torch.Tensor, labels: torch.Tensor, weight: float, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed losses of fp32 ``scores`` (t, V) at ``labels`` (t,), and ``weight`` times their gradient.

    The gradient takes the scores' place; without ``needs_gradient`` they stay.
    """
    index = labels[:, None]
    wanted = scores.gather(1, index)
    if not needs_gradient:
        return (scores.logsumexp(1, keepdim=True) - wanted).sum(), scores
    largest = scores.amax(1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(1, keepdim=True)  # in place: a piece is as large as memory allows
    loss = (total.log() + largest - wanted).sum()
    scores.mul_(weight / total).scatter_add_(1, index, torch.full_like(total, -weight))
    return loss, scores


def rows_at_once(width: int, device: torch.device) -> int:
    """Of so many elements each, that are in fp32 at one time."""
    return max(1, LOSS_BYTES[device.type] // (4 * width))


class _HeadLoss(torch.autograd.Function):
    """Loss of hidden states (k, h) at labels (k,) through the head and its tail, a few rows at a time.

    The gradient of the hidden states is made at once, so that no logits are kept and ZeRO-3 gathers the head once.  The
    logits' gradient is rounded to their type, as autograd does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        matrix: torch.Tensor,
        bias: torch.Tensor | None,
        tail: Tail,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        count = rows_at_once(matrix.shape[0] * (1 if tail is _same else TAIL_COPIES), hidden.device)
        for start in range(0, hidden.shape[0], count):
            piece = slice(start, start + count)
            logits = nn.functional.linear(hidden[piece], matrix, bias)
            with torch.set_grad_enabled(needed and tail is not _same):
                scores = tail(logits.requires_grad_(torch.is_grad_enabled()))
            loss, change = cross_entropy(scores.detach().float(), labels[piece], weight, needed)
            total += loss
            if gradient is not None:
                change = change.to(logits.dtype)
                if tail is not _same:
                    (change,) = torch.autograd.grad(scores, logits, change)
                torch.mm(change, matrix, out=gradient[piece])
        ctx.save_for_backward(gradient)
        return total * weight

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output[0]), None, None, None, None, None  # by 1, where the loss is differentiated


class RowsHead(nn.Linear):
    """A frozen head without a bias, of whose logits some are of trained rows: in the places of its own, or behind."""

    rows: nn.Parameter
    """(k, h)."""
    tokens: torch.Tensor
    """(k,): their ids, ascending; ``inside`` those that it has a logit of its own for."""
    inside: torch.Tensor

    @classmethod
    def put(cls, head: Any, rows: nn.Parameter, tokens: Sequence[int], old: int, words: int) -> None:
        """Let a plain head with ``old`` logits be one with ``words``."""
        head.register_parameter("rows", rows)
        head.register_buffer("tokens", torch.tensor(tokens, device=rows.device), persistent=False)
        head.register_buffer("inside", head.tokens[head.tokens < old], persistent=False)
        head.out_features = words
        head.__class__ = cls

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _RowsProduct.apply(input, self.rows, self)


class _RowsProduct(torch.autograd.Function):
    """Logits (..., V) of hidden states (..., h).  The rows' gradient is added to their ``main_grad``."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: nn.Parameter, head: RowsHead) -> torch.Tensor:
        ctx.head = head
        ctx.save_for_backward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = flat.new_empty(flat.shape[0], head.out_features)
        torch.mm(flat, head.weight.T, out=logits[:, : head.weight.shape[0]])
        logits[:, head.tokens] = flat @ rows.T
        return logits.view(*hidden.shape[:-1], head.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        head, (hidden,) = ctx.head, ctx.saved_tensors
        of_rows, of_base = grads[0][..., head.tokens], grads[0][..., : head.weight.shape[0]]
        if head.inside.numel():
            of_base = of_base.clone()
            of_base[..., head.inside] = 0
        if ctx.needs_input_grad[1]:
            _add_gradient(head.rows, of_rows, hidden)
        return of_base @ head.weight + of_rows @ head.rows, None, None


class WholeHead(nn.Linear):
    """A head without a bias that is trained: its gradient goes straight into its ``main_grad``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _WholeProduct.apply(input, self.weight)


class _WholeProduct(torch.autograd.Function):
    """Logits (..., V) of hidden states (..., h).  Autograd's own would make the gradient of all V h weights first."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(hidden)
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.needs_input_grad[1]:
            _add_gradient(ctx.weight, grads[0], *ctx.saved_tensors)
        return grads[0] @ ctx.weight, None


def _add_gradient(weight: Any, grad_output: torch.Tensor, layer_input: torch.Tensor) -> None:
    """To the weight's ``main_grad``, a few rows at a time: what a GPU makes beside it, and a CPU copies, is in fp32."""
    change = grad_output.reshape(-1, grad_output.shape[-1])
    count = rows_at_once(max(weight.shape[1], change.shape[0]), change.device)
    for part, main_grad in zip(change.split(count, dim=1), weight.main_grad.split(count), strict=True):
        weight_gradient(part, layer_input, main_grad)
    weight.grad_added_to_main_grad = True
