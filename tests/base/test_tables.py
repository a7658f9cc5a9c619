"""Which rows of embedding and head are trained, and of which models they cannot be."""

from __future__ import annotations

import pytest
from torch import nn

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.tables import Table, new_ids, plan_tables
from lora_one_dist.base.targets import find_targets
from lora_one_dist.config.lora import LoraConfig
from tests import models

BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture
def model():
    return models.llama(layers=1)


def planned(model, *new: int, **lora) -> list[Table]:
    config = LoraConfig(r=2, **lora)
    return plan_tables(model, config, find_targets(model, config), new)


def test_ids_that_are_new_to_a_model(model):
    tokenizer = models.tokenizer("llama")
    assert new_ids(model, tokenizer, []) == []  # its largest id is the model's last
    tokenizer.add_tokens(["<a>", "<b>"])
    assert new_ids(model, tokenizer, []) == [64, 65], "the tokenizer has them and the model has not"
    assert new_ids(model, tokenizer, [65, 40]) == [40, 64, 65]
    tokenizer.add_tokens([f"<{i}>" for i in range(63)])
    with pytest.raises(ModelError, match=r"largest id is 128, the model has 64 embeddings\. Use the tokenizer that"):
        new_ids(model, tokenizer, [])


def test_tables(model):
    assert planned(model) == []
    apart = planned(model, 64, 65)
    assert [(t.modules, t.rows, t.trained, t.size, t.name) for t in apart] == [
        (("model.embed_tokens",), 66, 2, 64, "model.embed_tokens.weight"),
        (("lm_head",), 66, 2, 64, "lm_head.weight"),
    ]
    (head,) = planned(model, modules_to_save=["lm_head"])
    assert (head.modules, head.rows, head.trained) == (("lm_head",), 64, 64)
    (beside,) = planned(model, modules_to_save=["embed_tokens"], target_modules=["lm_head"])
    assert beside.modules == ("model.embed_tokens",), "the head has an adapter, and no row that is trained"
    assert [t.trained for t in planned(model, 64, modules_to_save=BOTH)] == [65, 65]
    (tied,) = planned(models.qwen2(), 20, modules_to_save=["lm_head"])
    assert (tied.modules, tied.rows, tied.trained, tied.new) == (("model.embed_tokens", "lm_head"), 64, 64, (20,))


def with_bias(model):
    model.lm_head = nn.Linear(32, 64)


def with_other_embedding(model):
    model.embed_tokens_per_layer = nn.Embedding(64, 4)


def with_norm(model):
    model.set_input_embeddings(nn.Embedding(64, 32, max_norm=1.0))


def with_two_stacks(model):
    model.decoder_tokens = nn.Embedding(64, 32)
    model.decoder_tokens.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "lora", "message"),
    [
        (with_two_stacks, {"modules_to_save": BOTH}, "cannot be trained: decoder_tokens shares its embedding's weight"),
        (with_bias, {"new_tokens": ["<a>"]}, r"new_tokens = \['<a>'\]: rows of this model cannot be trained: .*a bias"),
        (
            with_norm,
            {},
            r"more tokens than the model: rows of this .*\. Take the model's own tokenizer",
        ),
        (with_other_embedding, {}, "embed_tokens_per_layer has a row for each of the 64 tokens too"),
        (None, {"modules_to_save": ["q_proj"]}, "q_proj is neither model.embed_tokens nor lm_head"),
        (None, {"modules_to_save": ["lm_head"]}, "must name both model.embed_tokens and lm_head, or none"),
        (None, {"target_modules": ["lm_head"]}, "lm_head has rows that are trained"),
    ],
)
def test_what_is_refused(change, lora, message, model):
    if change is not None:
        change(model)
    with pytest.raises(ModelError, match=message):
        planned(model, 64, **lora)
