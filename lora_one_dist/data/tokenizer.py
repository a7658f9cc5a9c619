"""The tokenizer of a model, with something to pad with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import root_cause

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def load_tokenizer(path: str, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer of a model, padding with its own pad token or else its eos or unk token.

    Raises DataError: there is no tokenizer, or none of the three tokens.
    """
    from transformers import AutoTokenizer

    remedy = "model.path needs what a tokenizer's save_pretrained writes"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises plain Exception on a damaged file
        if not trust_remote_code and "trust_remote_code" in str(error):
            rule = "its tokenizer is Python code of its own, which model.trust_remote_code = false does not run"
            raise DataError(f"model.path = {path}: {rule}. Read the code, then set it to true.") from error
        raise DataError(f"model.path = {path}: no tokenizer can be loaded: {root_cause(error)}. {remedy}.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"model.path = {path}: has no pad, eos or unk token to pad with. {remedy}, with one of them.")
    return tokenizer
