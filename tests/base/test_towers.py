"""What is left of a whole model that is trained on text."""

from __future__ import annotations

import pytest
import transformers
from accelerate import init_empty_weights

from lora_one_dist.base.towers import drop_towers

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}


def gemma3():
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=EYES | {"patch_size": 14}, image_token_index=9)
    with init_empty_weights(include_buffers=False):
        return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("read", [(), ("multi_modal_projector",)])
def test_parts_that_text_does_not_need_are_dropped(read, monkeypatch):
    forward = transformers.Gemma3Model.forward

    def reading(self, *args, **kwargs):
        assert all(hasattr(self, name) for name in read), "as Gemma 3n looks text up in its other parts"
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Gemma3Model, "forward", reading)
    model = gemma3()
    order = [name for name, _ in model.model.named_children()]
    drop_towers(model)
    dropped = {"vision_tower", "multi_modal_projector"} - set(read)
    assert {name.split(".")[-2] for name in model.towers_dropped} == dropped
    assert [name for name, _ in model.model.named_children()] == [name for name in order if name not in dropped]


def test_a_language_model_has_no_such_parts(llama):
    drop_towers(llama)
    assert llama.towers_dropped == ()
