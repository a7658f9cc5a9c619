"""Documents laid end to end: the same loss and gradients, by a kernel of plain attention in the place of the GPU's."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_one_dist.base import varlen
from lora_one_dist.base.loss import loss_sum
from lora_one_dist.base.packable import refuse_unpackable
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.data.batches import collate
from tests import models, reference
from tests.base.test_head import build, input_gradient, trained_below


def by_documents(q, k, v, bounds, longest, scale, window):
    """What the kernel does: causal attention in each document, of at most ``window`` tokens back."""
    starts = bounds.tolist()
    assert longest == max(b - a for a, b in itertools.pairwise(starts))
    groups, outputs = q.shape[1] // k.shape[1], []
    k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
    for a, b in itertools.pairwise(starts):
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        mask = (distance >= 0) & ((window[0] < 0) | (distance <= window[0]))
        heads = (tensor[a:b].transpose(0, 1) for tensor in (q, k, v))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale))
    return torch.cat(outputs, 1).transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(varlen, "_kernel", by_documents)


def packed(samples):
    """All of them in one row, with padding behind: a document's first token is no target."""
    ids = list(itertools.chain(*(sample["input_ids"] for sample in samples)))
    labels = list(itertools.chain(*([-100, *sample["labels"][1:]] for sample in samples)))
    row = {"input_ids": ids, "labels": labels, "lengths": [len(sample["input_ids"]) for sample in samples]}
    short = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "lengths": [3]}
    return collate([row, short], 0)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Granite"])
@pytest.mark.parametrize("lay_out", [lambda samples: collate(samples, 0), packed], ids=["padded", "packed"])
def test_loss_and_gradient_are_those_of_the_samples_by_themselves(kind, lay_out, kernel):
    samples = models.samples(5)
    exact = trained_below(build(kind, torch.float64))
    truth = torch.cat([reference.token_losses(exact, sample) for sample in samples]).sum()
    expected = input_gradient(exact, truth)
    net = trained_below(build(kind))
    net.config._attn_implementation = varlen.NAME
    for _ in range(2):
        net.zero_grad()
        loss = loss_sum(net, lay_out(samples))
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        assert reference.relative(input_gradient(net, loss), expected) <= 1e-5


def test_weightless_batch_has_loss_zero(kernel):
    net = trained_below(build("Llama"))
    net.config._attn_implementation = varlen.NAME
    loss = loss_sum(net, collate(models.samples(3), 0, weightless=True))
    assert loss.item() == 0
    assert not input_gradient(net, loss).any()


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ({"softcap": 50.0}, "hands softcap to attention"),
        ({"s_aux": torch.zeros(4)}, "hands s_aux to attention"),
        ({"dropout": 0.1}, "hands dropout to attention"),
        ({"is_causal": False}, "hands is_causal=False to attention"),
        ({"cu_seq_lens_q": None}, "keeps the documents' bounds back"),
    ],
)
def test_a_keyword_that_changes_the_scores_is_refused(keyword, said, kernel):
    q = torch.zeros(1, 4, 3, 8)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3}
    assert varlen.attend(None, q, q, q, None, softcap=None, is_causal=True, **bounds)[0].shape == (1, 3, 4, 8)
    with pytest.raises(ModelError, match=said):
        varlen.attend(None, q, q, q, None, **{**bounds, **keyword})


def test_a_model_that_caps_its_scores_is_refused(kernel):
    net = build("Gemma2")
    net.config._attn_implementation = varlen.NAME
    with pytest.raises(ModelError, match=r"Gemma2Attention hands softcap to attention.*Take sdpa or eager"):
        loss_sum(net, collate(models.samples(2), 0))


def test_layers_that_mix_a_rows_tokens_are_refused_and_a_cpu_too():
    net = build("Llama")
    net.config._attn_implementation = varlen.NAME
    refuse_unpackable(net)
    net.extra = torch.nn.Conv1d(2, 2, 1)
    with pytest.raises(ModelError, match="mixes the tokens of a row"):
        refuse_unpackable(net)
    with pytest.raises(ModelError, match=r"varlen: the kernel is a GPU's, and there is none\. Take sdpa"):
        varlen.refuse_cpu()
    with varlen.generating(net):
        assert net.config._attn_implementation == "sdpa"
    assert net.config._attn_implementation == varlen.NAME
