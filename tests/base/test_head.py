"""The loss at targets alone against whole logits in float64, for what models do to their logits; and no mask."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lora_one_dist.base import head
from lora_one_dist.base.graph import begin_at_embeddings
from lora_one_dist.base.loss import loss_sum
from lora_one_dist.cluster import comm
from lora_one_dist.data import batches
from tests import models, reference

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# What the config says of the logits is what must be found; the mask's models are those of reference/architectures.
KINDS: dict[str, dict[str, object]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 5, "head_dim": 8},
    "Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 5, "head_dim": 8},
    "Gemma3": {"final_logit_softcapping": 5.0, "sliding_window": 5, "head_dim": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Olmo2": {},
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "GPTNeoX": {"rotary_pct": 0.5},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 2, "n_head": 4},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**{**SIZES, **KINDS[kind]})
    net = getattr(transformers, f"{kind}ForCausalLM")(config).to(comm.device(), dtype)
    net.requires_grad_(False)
    net.enable_input_require_grads()
    return net.eval()


def input_gradient(net: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """With respect to the first block's last linear layer, the embedding's stand-in for every weight below the head."""
    layer = [m for m in net.modules() if isinstance(m, nn.Linear) and m is not net.get_output_embeddings()][-1]
    loss.backward()
    return layer.weight.grad


def trained_below(net: nn.Module) -> nn.Module:
    layer = [m for m in net.modules() if isinstance(m, nn.Linear) and m is not net.get_output_embeddings()][-1]
    layer.weight.requires_grad_()
    return net


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
def test_loss_and_gradient_of_padded_rows_are_those_of_the_samples_by_themselves(kind, rows_at_once, monkeypatch):
    monkeypatch.setitem(head.LOSS_BYTES, "cpu", 4 * 64 * rows_at_once)
    samples = models.samples(5)
    exact = trained_below(build(kind, torch.float64))
    truth = torch.cat([reference.token_losses(exact, sample) for sample in samples]).sum()
    expected = input_gradient(exact, truth / 40)
    net = trained_below(build(kind))
    for _ in range(2):  # the first pass also finds out what the model does to its logits
        net.zero_grad()
        loss = loss_sum(net, batches.collate(samples, 0), 1 / 40)
        assert head.why_whole(net) is None
        assert loss.item() == pytest.approx(truth.item() / 40, rel=1e-5)
        assert reference.relative(input_gradient(net, loss), expected) <= 1e-5  # fp32 sums of 60 terms
        net.eval()


def padded_with_mask(net: nn.Module, samples: list) -> torch.Tensor:
    """The loss as transformers takes it of a padded batch."""
    batch = batches.collate(samples, 0)
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_mask_of_the_padding_would_change_nothing(kind):
    samples, net = models.samples(4), trained_below(build(kind))
    masked = padded_with_mask(net, samples)
    expected = input_gradient(net, masked)
    net.zero_grad()
    loss = loss_sum(net, batches.collate(samples, 0))
    assert loss.item() == pytest.approx(masked.item(), rel=1e-6)
    assert reference.relative(input_gradient(net, loss), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_gradient_in_bf16_is_rounded_once_more_at_most(kind, monkeypatch):
    monkeypatch.setitem(head.LOSS_BYTES, "cpu", 4 * 64 * 5)
    samples, exact = models.samples(5), build(kind, torch.bfloat16)
    whole = trained_below(exact)
    truth = input_gradient(whole, padded_with_mask(whole, samples)).clone()
    whole.zero_grad()
    found = input_gradient(whole, loss_sum(whole, batches.collate(samples, 0)))
    assert reference.relative(found, truth) <= 2e-2  # bf16: 4e-3 an element, each way


def products(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the head's product is given, call by call."""
    rows, stock, weight = [], nn.functional.linear, net.get_output_embeddings().weight

    def counting(given: torch.Tensor, matrix: torch.Tensor, *rest: object) -> torch.Tensor:
        if matrix is weight:
            rows.append(given.numel() // given.shape[-1])
        return stock(given, matrix, *rest)

    monkeypatch.setattr(nn.functional, "linear", counting)
    return rows


def test_no_logits_are_made_of_rows_without_a_target(monkeypatch):
    net, batch = build("Llama"), batches.collate(models.samples(5), 0)
    targets = int((batch["labels"][:, 1:] != -100).sum())
    assert targets < batch["labels"].numel()
    rows = products(net, monkeypatch)
    loss_sum(net, batch)
    assert rows == [targets, head.CHECKED_ROWS]
    rows.clear()
    loss_sum(net, batch)
    loss_sum(net, batch, head_is_target=True)
    assert rows == [targets, targets]


class Odd(transformers.LlamaForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sin() * 3
        return output


def test_what_is_not_known_is_done_by_the_model_itself_to_all_target_rows_at_once(monkeypatch):
    torch.manual_seed(3)
    net = Odd(transformers.LlamaConfig(**SIZES)).requires_grad_(False)
    net.enable_input_require_grads()
    samples = models.samples(5)
    exact = trained_below(Odd(net.config).double())
    exact.load_state_dict({name: tensor.double() for name, tensor in net.state_dict().items()})
    truth = torch.cat([reference.token_losses(exact, sample) for sample in samples]).sum()
    expected = input_gradient(exact, truth)
    trained_below(net)
    rows = products(net, monkeypatch)
    for _ in range(2):
        net.zero_grad()
        loss = loss_sum(net, batches.collate(samples, 0))
        assert "not known" in head.why_whole(net)
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        assert reference.relative(input_gradient(net, loss), expected) <= 1e-5
    targets = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    assert rows == [targets, head.CHECKED_ROWS, targets, targets]


class Headless(transformers.LlamaForCausalLM):
    """Multiplies by a layer that it does not name its head."""

    def get_output_embeddings(self):
        return None


def test_a_model_without_a_named_head_gives_all_its_logits():
    torch.manual_seed(3)
    net = Headless(transformers.LlamaConfig(**SIZES)).requires_grad_(False)
    net.enable_input_require_grads()
    samples = models.samples(5)
    truth = torch.cat([reference.token_losses(net, sample) for sample in samples]).sum()
    assert loss_sum(net, batches.collate(samples, 0)).item() == pytest.approx(truth.item(), rel=1e-5)


def test_logits_of_a_head_that_sees_more_rows_than_tokens_are_all_made():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_decoder_layers": 1, "decoder_ffn_dim": 48, "num_decoder_attention_heads": 4}
    net = transformers.ProphetNetForCausalLM(transformers.ProphetNetConfig(vocab_size=64, **sizes)).eval()
    net.requires_grad_(False)
    samples = models.samples(5)
    truth = torch.cat([reference.token_losses(net, sample) for sample in samples]).sum()
    for _ in range(2):
        assert loss_sum(net, batches.collate(samples, 0)).item() == pytest.approx(truth.item(), rel=1e-5)


def test_a_head_in_a_module_of_its_own_hands_that_module_a_gradient():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4}
    net = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=64, is_decoder=True, **sizes)).eval()
    net.requires_grad_(False)
    begin_at_embeddings(net)
    reached = []
    net.cls.register_forward_hook(lambda layer, given, output: output.register_hook(reached.append) and None)
    for _ in range(2):
        loss_sum(net, batches.collate(models.samples(5), 0)).backward()
    assert len(reached) == 2, "DeepSpeed gathers the module's weights by it"
    assert "module of its own" in head.why_whole(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_trained_head_is_made_a_few_rows_at_a_time(dtype, monkeypatch):
    monkeypatch.setitem(head.LOSS_BYTES, "cpu", 4 * 32 * 10)  # ten rows
    shapes, product = [], head.weight_gradient
    monkeypatch.setattr(head, "weight_gradient", lambda *given: shapes.append(given[2].shape) or product(*given))
    torch.manual_seed(0)
    layer = head.WholeHead(32, 64, bias=False, dtype=dtype)
    layer.weight.main_grad = torch.ones(64, 32)
    hidden, change = torch.randn(1, 5, 32).to(dtype).requires_grad_(), torch.randn(1, 5, 64).to(dtype)
    layer(hidden).backward(change)
    exact = 1 + change[0].double().T @ hidden[0].detach().double()
    assert shapes == [(10, 32)] * 6 + [(4, 32)]
    assert reference.relative(layer.weight.main_grad, exact) <= 1e-6
    torch.testing.assert_close(hidden.grad, change @ layer.weight)
