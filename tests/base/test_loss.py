"""The loss against autograd's and a loop over samples, and dropout that is off around it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from lora_one_dist.base import head
from lora_one_dist.base.dropout import dropout_off
from lora_one_dist.base.loss import _CrossEntropySum, loss_sum
from lora_one_dist.cluster import comm
from lora_one_dist.data import batches
from tests import models, reference
from tests.base.checkpoints import gpt2, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
def test_loss_and_its_gradient_equal_autograds(dtype, rows_at_once, monkeypatch):
    monkeypatch.setitem(head.LOSS_BYTES, "cpu", 4 * 50 * rows_at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 50, generator=generator)).to(dtype)
    labels = torch.tensor([3, 12, 0, 49, 30, 7, 7])
    truth = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(truth, labels, reduction="sum") / 77
    exact.backward()
    leaf = logits.clone().requires_grad_()
    summed = _CrossEntropySum.apply(leaf.clone(), labels, 1 / 77)  # as the model's own: not a leaf
    (gradient,) = torch.autograd.grad(summed, leaf)
    assert summed.item() == pytest.approx(exact.item(), rel=1e-6)
    # Rounded once to the logits' type (bf16: 8 bits, so to 2^-8 of itself); fp32 products before that.
    limit = (2**-8 if dtype == torch.bfloat16 else 0) * truth.grad.abs() + 1e-6 / 77
    assert ((gradient - truth.grad).abs() <= limit).all()
    assert gradient.dtype == dtype


def test_loss_of_no_target_is_zero_and_evaluation_leaves_the_logits():
    logits = torch.randn(3, 5)
    kept, leaf = logits.clone(), logits.clone().requires_grad_()
    summed = _CrossEntropySum.apply(leaf[:0].clone(), torch.empty(0, dtype=torch.long), 1.0)
    assert summed.item() == 0
    assert not torch.autograd.grad(summed, leaf)[0].any()
    with torch.no_grad():
        _CrossEntropySum.apply(logits, torch.tensor([0, 1, 4]), 1.0)
    assert torch.equal(logits, kept)


# Forward passes -------------------------------------------------------------------------------------------------------


def opt():
    torch.manual_seed(4)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5))


def llama_with_dropout():
    torch.manual_seed(5)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_dropout=0.5, initializer_range=0.2))


def floats(net):
    """Every float attribute of every module: the probabilities among them."""
    return [value for module in net.modules() for value in vars(module).values() if isinstance(value, float)]


@pytest.mark.parametrize(
    "build",
    [lambda: gpt2(resid_pdrop=0.5, attn_pdrop=0.4, embd_pdrop=0.3), opt, llama_with_dropout],
    ids=["gpt2: modules", "opt: a function with the layer's attribute", "llama: in the attention kernel"],
)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_for_the_block_and_back_after_it(build, training):
    net = build()
    with torch.no_grad():
        expected = net.eval()(input_ids=ids()).logits
        net.train(training)
        before = floats(net)
        with dropout_off(net):
            assert net.training, "gradient checkpointing needs train mode"
            assert torch.allclose(net(input_ids=ids()).logits, expected, atol=1e-5)
        assert net.training == training
        with pytest.raises(KeyError), dropout_off(net):
            raise KeyError
        assert net.training == training
        assert floats(net) == before
        assert not torch.allclose(net.train()(input_ids=ids()).logits, expected, atol=1e-2), "it drops again"


def test_dropout_that_the_forward_reads_from_the_config_is_off_too():
    base = models.llama(1)
    base.config.hidden_dropout = 0.5
    with dropout_off(base):
        assert base.config.hidden_dropout == 0.0
    assert base.config.hidden_dropout == 0.5


def test_loss_sum_equals_a_loop_over_unpadded_samples(llama):
    net, samples = models.llama(layers=2).to(comm.device()), models.samples(5)
    assert len({len(sample["input_ids"]) for sample in samples}) > 1, "some are padded"
    with torch.no_grad():
        expected = sum(float(reference.token_losses(llama, sample).sum()) for sample in samples)
    found = loss_sum(net, batches.collate(samples, 0))
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-5)  # fp32 sums of 60 terms


def test_loss_of_bf16_logits_is_summed_in_fp32():
    net, batch = models.llama(layers=1).to(comm.device(), torch.bfloat16), batches.collate(models.samples(30), 0)
    with torch.no_grad():
        found = loss_sum(net, batch)
        logits = net(**{key: batch[key].to(comm.device()) for key in ("input_ids", "attention_mask")}).logits.double()
    targets = batch["labels"][:, 1:].to(comm.device())
    terms = -logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    # A sum above 1024 kept in bf16 would be off by up to 4.
    assert found.item() == pytest.approx(float(terms[targets != -100].sum()), rel=1e-5)


def test_weightless_batch_has_loss_and_gradient_zero():
    net = models.llama(layers=1).to(comm.device())
    loss = loss_sum(net, batches.collate(models.samples(3), 0, weightless=True))
    assert loss.item() == 0.0
    loss.backward()
    assert float(net.model.layers[0].mlp.up_proj.weight.grad.abs().max()) == 0.0, "not NaN"
