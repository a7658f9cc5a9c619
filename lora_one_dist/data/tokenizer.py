"""The tokenizer of a model, with something to pad with, and with new tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
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


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer, each found in a text as it is written; returns their ids.

    Normalised, one behind a word would be missed where a normaliser puts a space in front of every text (Llama 2).

    Raises DataError: it has one of them, or gives one an id that is another's.
    """
    from transformers import AddedToken

    before = tokenizer.get_vocab()
    known = [token for token in tokens if token in before]
    if known or len(set(tokens)) < len(tokens):
        twice = known or [token for token in tokens if list(tokens).count(token) > 1]
        rule = "the tokenizer has it already" if known else "it is named twice"
        raise DataError(f"lora.new_tokens = {list(tokens)}: {twice[0]!r} is not new: {rule}. Leave it out.")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    taken = set(before.values()) & set(ids)
    if taken or len(set(ids)) < len(ids):
        raise DataError(
            f"lora.new_tokens = {list(tokens)}: the tokenizer gives them the ids {ids}, which other tokens have. Add "
            "them to the tokenizer yourself, save it beside the model, and leave new_tokens out."
        )
    return ids


def saved(tokenizer: Any) -> dict[str, bytes]:
    """The files that ``save_pretrained`` writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
