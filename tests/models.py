"""Small models with every trait that the tests need, written to a folder from a fixed seed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_one_dist.config.settings import DeepSpeedConfig

VOCABULARY = 64


def llama(layers: int = 4) -> PreTrainedModel:
    """Llama with grouped-query attention (4 heads, 2 key/value heads): 7 targets a layer."""
    torch.manual_seed(11)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )


def qwen2() -> PreTrainedModel:
    """Qwen2: biases on q, k, v, tied embeddings, 5 layers (2, 3 and 4 do not divide it)."""
    torch.manual_seed(12)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=True,
            use_sliding_window=False,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def t5(**changes: object) -> PreTrainedModel:
    """T5 of its first form: one weight for both embeddings and the head, 4 blocks that read and 3 that write."""
    torch.manual_seed(13)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "dropout_rate": 0.0}
    given = {**sizes, "num_layers": 4, "num_decoder_layers": 3, "decoder_start_token_id": 0, "eos_token_id": 2}
    return T5ForConditionalGeneration(T5Config(**{**given, **changes}))


MODELS = {"llama": llama, "qwen2": qwen2, "t5": t5}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a word: w3 to w63; pad 0, bos 1 (added in front), eos 2.  For qwen2, by characters: its own class.

    For t5 no bos, and eos behind every text.
    """
    if kind == "qwen2":
        symbols = ["<|endoftext|>", "<pad>", "</s>", "Ġ", "w", *"0123456789"]
        vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
        return Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="</s>")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    around = ("$A </s>", [("</s>", 2)]) if kind == "t5" else ("<s> $A", [("<s>", 1)])
    inner.post_processor = TemplateProcessing(single=around[0], special_tokens=around[1])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save(kind: str, folder: Path, shard_size: str = "20KB") -> Path:
    """Write the model in several safetensors shards, and the tokenizer."""
    MODELS[kind]().save_pretrained(folder, max_shard_size=shard_size)
    tokenizer(kind).save_pretrained(folder)
    return folder


def deepspeed_config(name: str, shard_group: str = "world", **zero: object) -> DeepSpeedConfig:
    """One of ds_configs/, with more settings of its zero_optimization."""
    policy = json.loads(Path(f"ds_configs/{name}.json").read_text())
    policy["zero_optimization"] |= zero
    path = Path(tempfile.mkdtemp()) / f"{name}.json"
    path.write_text(json.dumps(policy))
    return DeepSpeedConfig(config=str(path), shard_group=shard_group)


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """A task to learn: repeat the prompt's words, each one further in the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, 7, (), generator=generator))
        ids = torch.randint(3, VOCABULARY - 1, (length,), generator=generator).tolist()
        made.append({"prompt": " ".join(f"w{i}" for i in ids), "completion": "".join(f" w{i + 1}" for i in ids)})
    return made


def samples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token sequences of uneven length with a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 20, (), generator=generator))
        prompt = int(torch.randint(1, 5, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows
