"""A sample's loss does not depend on what shares its micro-batch, row or padding, whatever the rotary scaling."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from lora_one_dist.base.loss import loss_sum
from lora_one_dist.base.rope import original_length, refuse_beyond, refuse_without_position, table_length
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.data import packing
from lora_one_dist.data.batches import IGNORE_INDEX, collate
from tests import models
from tests.data.test_packing import token_data

ORIGINAL, ROOM = 12, 36
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
# Documents of packed rows: one of 36 tokens beside one of 17, whose padding is longer than the longest may be.
LENGTHS = (12, 12, 12, 9, 8)


def phi3(**changes):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
    lengths = {"max_position_embeddings": 4 * ORIGINAL, "original_max_position_embeddings": ORIGINAL}
    torch.manual_seed(5)
    return Phi3ForCausalLM(Phi3Config(**{**SIZES, **lengths, "rope_parameters": rope, **changes})).eval()


def dynamic_llama():
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0}
    torch.manual_seed(6)
    config = LlamaConfig(**SIZES, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    return LlamaForCausalLM(config).eval()


MODELS = {"phi3, longrope": phi3, "llama, dynamic": dynamic_llama}


def samples(*lengths):
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]})
    return made


def loss(net, batch):
    with torch.no_grad():
        return float(loss_sum(net, batch))


def shares(net, batch, pieces):
    """The part of each piece (row, start, length) in a batch's loss: the others' labels are taken away."""
    found = []
    for row, start, length in pieces:
        labels = torch.full_like(batch["labels"], IGNORE_INDEX)
        labels[row, start : start + length] = batch["labels"][row, start : start + length]
        found.append(loss(net, batch | {"labels": labels}))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_samples_loss_is_its_share_of_any_micro_batch(kind, attention):
    net = MODELS[kind]()
    net.config._attn_implementation = attention
    given = samples(*LENGTHS)
    alone = [loss(net, collate([sample], 0)) for sample in given]
    assert min(alone) > 1
    padded = shares(net, collate(given, 0), [(row, 0, length) for row, length in enumerate(LENGTHS)])
    assert padded == pytest.approx(alone, rel=1e-5)  # fp32 sums in another order

    data = packing.pack(token_data(given), ROOM)
    rows = [data.dataset[i] for i in range(len(data))]
    batch = collate(rows, 0)
    assert [len(row["labels"]) for row in rows] == [36, 17]
    pieces, of_sample = [], []
    for number, row in enumerate(rows):
        starts = itertools.accumulate(row["lengths"], initial=0)
        pieces += [(number, start, length) for start, length in zip(starts, row["lengths"], strict=False)]
        of_sample += data.rows_of(number)
    expected = [alone[sample] for sample in of_sample]
    found = shares(net, batch, pieces)
    assert found == pytest.approx(expected, rel=1e-5)
    # Planted: padding that counts on, 19 tokens of it, as one document.
    width = batch["input_ids"].shape[1]
    planted = batch | {"position_ids": batch["position_ids"].clone()}
    planted["position_ids"][1, 17:] = torch.arange(width - 17)
    wrong = shares(net, planted, pieces)
    assert wrong != pytest.approx(expected, rel=1e-3)
    far = [max(abs(a / b - 1) for a, b in zip(x, expected, strict=True)) for x in (found, wrong)]
    print(f"{kind}, {attention}: packed within {far[0]:.1e} of alone; {far[1]:.1e} with padding as one document")


@pytest.mark.parametrize("kind", MODELS)
def test_above_the_original_length_it_would_depend_and_is_refused(kind):
    net, (short, long) = MODELS[kind](), samples(ORIGINAL, 3 * ORIGINAL)
    alone = loss(net, collate([short], 0))
    together = shares(net, collate([short, long], 0), [(0, 0, ORIGINAL)])
    print(f"{kind}: {alone:.3f} alone, {together[0]:.3f} beside a longer sample")
    assert together != pytest.approx([alone], rel=1e-3)
    refuse_beyond(net, ORIGINAL, "", "")
    rope = kind.partition(", ")[2]
    message = (
        rf"^x has 13 tokens; above its original length of 12 {type(net).__name__} turns .*rope_type {rope}\).* To 12\.$"
    )
    with pytest.raises(ModelError, match=message):
        refuse_beyond(net, ORIGINAL + 1, "x", "To {}.")


@pytest.mark.parametrize("kind", MODELS)
def test_an_answer_up_to_the_original_length_is_the_one_given_alone(kind):
    """As evaluation asks: prompts padded on the left."""
    net, prompts, new = MODELS[kind](), [sample["input_ids"] for sample in samples(3, 8)], 4
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    assert width + new == ORIGINAL
    given = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": 63}
    together = net.generate(input_ids=ids, attention_mask=mask, **given)[:, width:].tolist()
    for prompt, answer in zip(prompts, together, strict=True):
        assert net.generate(input_ids=torch.tensor([prompt]), **given)[0, len(prompt) :].tolist() == answer


def test_the_original_length_is_the_configs():
    assert original_length(phi3().config) == (ORIGINAL, "longrope")
    assert original_length(dynamic_llama().config) == (ORIGINAL, "dynamic")
    assert original_length(models.llama(1).config) is None
    for kind in ("linear", "llama3", "yarn"):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 100.0, "original_max_position_embeddings": 12}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
        assert original_length(LlamaConfig(**SIZES, rope_parameters=rope)) is None
    config = LlamaConfig(**SIZES, max_position_embeddings=50)
    config.rope_parameters = {"full": {"rope_type": "dynamic"}, "sliding": {"rope_type": "default"}}
    assert original_length(config) == (50, "dynamic"), "a table for each kind of layer"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "roberta", "bert", "biogpt", "openai-gpt"])
def test_a_table_of_positions_ends_where_the_model_does(kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 1}
    sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 32, "intermediate_size": 32} | {"is_decoder": True}
    config = AutoConfig.for_model(kind, **sizes, max_position_embeddings=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    most = table_length(model)
    model(input_ids=torch.full((1, most), 5), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5), use_cache=False)
    refuse_without_position(model, most, "value", "Set {}.")
    with pytest.raises(
        ModelError, match=rf"value has {most + 1} tokens; \w+ has a table of {most} positions. Set {most}."
    ):
        refuse_without_position(model, most + 1, "value", "Set {}.")


def test_other_positions_have_no_end():
    assert table_length(models.llama(layers=1)) is None
    assert table_length(models.t5()) is None
