"""The tokenizer that is loaded, and those that are refused."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase, Prepend, Replace, Sequence
from transformers import PreTrainedTokenizerFast

from lora_one_dist.data.errors import DataError
from lora_one_dist.data.tokenizer import add_tokens, load_tokenizer
from tests.data.helpers import SPECIAL, build_tokenizer


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({}, "<pad>"),
        ({"pad_token": None}, "</s>"),
        ({"pad_token": None, "eos_token": None, "unk_token": "<|end|>"}, "<|end|>"),
    ],
)
def test_pad_token_of_a_loaded_tokenizer(tmp_path, tokens, pad):
    build_tokenizer(**tokens).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), False)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, SPECIAL.index(pad))


def test_a_tokenizer_that_cannot_pad_or_be_loaded_is_refused(tmp_path):
    build_tokenizer(pad_token=None, eos_token=None).save_pretrained(tmp_path / "no_pad")
    with pytest.raises(DataError, match=r"no_pad: has no pad, eos or unk token to pad with\. model\.path needs"):
        load_tokenizer(str(tmp_path / "no_pad"), False)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"model\.path = .*none: no tokenizer can be loaded: .*model\.path needs what"):
        load_tokenizer(str(tmp_path / "none"), False)
    build_tokenizer().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(DataError, match=r"damaged: no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "damaged"), False)


@pytest.mark.parametrize("normalizer", [Sequence([Prepend("▁"), Replace(" ", "▁")]), Lowercase()])
def test_a_new_token_is_found_wherever_it_stands(normalizer):
    """As it is written: Llama 2's normaliser would have a space in front of it, others small letters."""
    inner = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(["<unk>", "▁", *"<abhiknst>"])}, merges=[]))
    inner.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    (new,) = add_tokens(tokenizer, ["<Think>"])
    for text in ("<Think>a", "ab<Think>s", "a <Think> b", "a\n<Think>"):
        assert tokenizer(text).input_ids.count(new) == 1, text
        assert "<Think>" in tokenizer.decode(tokenizer(text).input_ids)
