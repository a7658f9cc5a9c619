"""A tokenizer of one token a character, rows for it, and its tokens and labels as text."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.rows import Rows

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(chat_template=CHAT, single="<s> $A", **tokens):
    """Byte-level BPE in which one token is one character, but for 'ab', ' b' and two line ends; `Ġ` is the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "b"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *(x + y for x, y in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if single:
        names = [(name, vocab[name]) for name in ("<s>", "</s>") if name in single]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
    backend.add_special_tokens(SPECIAL)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **tokens)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def typed(*rows):
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def dataset(*rows):
    """As a hub's data set or Parquet holds them."""
    return Rows([typed(*rows)])


def config(**settings):
    return DataConfig(train="unused.jsonl", **settings)


def turns(*contents):
    """user, assistant, user, assistant, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def read(sample, tokenizer):
    """(tokens, those with a label): '.' stands for a token without."""
    tokens = tokenizer.convert_ids_to_tokens(sample["input_ids"])
    for token_id, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (-100, token_id)
    return tokens, [t if label != -100 else "." for t, label in zip(tokens, sample["labels"], strict=True)]


def read_all(data, tokenizer):
    return [read(sample, tokenizer) for sample in data.dataset]
