"""Small models of the families that Megatron-core has, and Megatron on ranks of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import ranks

VOCABULARY = 300  # padded to 384, 512, 512 at TP 1, 2, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {  # the traits that a family has, each somewhere
    "llama2": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 8})),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}


def save(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face folder of a family's model, its norms and biases not the ones and zeros they start as."""
    torch.manual_seed(5)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(path, max_shard_size="100KB")
    (path / "tokenizer.json").write_text("{}")
    return path


def run(peer: str, checkpoints: list[Path], out: Path, tp: int, pp: int) -> torch.Tensor:
    """A script of tests/peers on ranks of its own; returns the tokens that it saw."""
    out.mkdir()
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.save(ids, out / "ids.pt")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(tp * pp), "--master_addr", "127.0.0.1"]
    script = [f"tests/peers/{peer}.py", *map(str, checkpoints), str(out / "ids.pt"), str(out), str(tp), str(pp)]
    with (out / "log").open("w") as log:  # no pipe: processes of Megatron's that outlive a failure would keep it open
        done = subprocess.run(
            [sys.executable, *launcher, "--master_port", str(ranks.free_port()), *script],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            timeout=240,
        )
    assert done.returncode == 0, (out / "log").read_text()[-3000:]
    return ids
