"""Chats to texts: the tokenizer's own template, and where assistant turns begin and end.  Pure."""

from __future__ import annotations

from typing import Any

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.rows import DataError


def _is_message(message: Any) -> bool:
    """A role, and something said or called."""
    return isinstance(message, dict) and bool(message.get("role")) and sum(v is not None for v in message.values()) > 1


def chat_texts(messages: Any, tokenizer: Any, config: DataConfig) -> list[str]:
    """A chat's text, then those beginnings of it that end where an assistant turn begins, ends, begins, ...

    Raises:
        DataError: for what is no chat, begins with an assistant turn, or has a template that rewrites earlier turns.
    """
    if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
        raise DataError(f"{config.messages} = {messages!r:.80}: must be a list of {{role, content}}. Mend the row")
    # Arrow gives every message the keys of all, None where it has none; transformers 5.17 lets templates print it.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False)]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and config.loss_on != "all"]
    if 0 in turns:
        raise DataError("starts with an assistant turn, which nothing asks for. Drop it or set data.loss_on: all")
    for i in turns:
        texts.append(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
        texts.append(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
    if not all(texts[0].startswith(text) for text in texts):
        value = "the chat template rewrites earlier turns, so what is learnt is not what is generated"
        raise DataError(f"{value}. Set data.loss_on: all, or take a chat_template that leaves them as they were")
    return texts
