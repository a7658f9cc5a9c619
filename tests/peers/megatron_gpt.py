"""Megatron-core's own GPTModel on CPU ranks: load our checkpoints, compute logits, save them again as Megatron does.

    python -c "from tests.peers.megatron_gpt import main; main()" IDS.pt TP PP CHECKPOINT OUT [CHECKPOINT OUT ...]

Of each checkpoint, one after the other, rank 0 writes OUT/logits.pt (PP 1 only), all ranks save OUT/saved through
Megatron's dist_checkpointing, and when all have, there is a file OUT/done.  MASTER_ADDR and MASTER_PORT say where the
ranks meet.  Run without a script, because each rank's first save starts a process that would import the script and with
it Megatron again.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import silu

torch.cuda.current_device = lambda: "cpu"  # what Megatron's forward and save ask of CUDA, answered for a CPU
torch.cuda.synchronize = lambda *_: None
torch.Tensor.cuda = lambda self, *_, **__: self

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.fusions import fused_softmax
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import layers, random
from megatron.core.transformer.transformer_config import TransformerConfig


class NoTracker:
    """In place of the tracker of CUDA's random states: there is no dropout here."""

    @contextlib.contextmanager
    def fork(self, *_: Any):
        yield

    def is_initialized(self) -> bool:
        return True


random.get_cuda_rng_tracker = layers.get_cuda_rng_tracker = lambda *_, **__: NoTracker()
tensor_parallel.get_cuda_rng_tracker = random.get_cuda_rng_tracker


def window_mask(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """Megatron's mask of a sliding window, true where nothing is attended to; its own asks for a GPU."""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return (distance > window[0]) | (distance < -window[1])


fused_softmax.get_sliding_window_causal_mask = window_mask


def model(args: Any, tp: int, pp: int) -> GPTModel:
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=silu,
        window_size=args.window_size,
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        parallel_output=False,
    )


@torch.no_grad()
def logits(gpt: Any, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1]).tril() < 0.5  # True: not attended to
    return gpt(ids, positions, mask)


def start(tp: int, pp: int) -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp)


def load(checkpoint: str, tp: int, pp: int) -> tuple[GPTModel, Any]:
    """The model of a checkpoint, and what its tensors are saved with."""
    torch.manual_seed(0)  # as if it were the first of the job
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    gpt = model(common["args"], tp, pp).eval()
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    loaded = dist_checkpointing.load(gpt.sharded_state_dict(metadata=metadata), checkpoint)
    gpt.load_state_dict({name: value for name, value in loaded.items() if name not in common}, strict=True)
    return gpt, metadata


def compute(gpt: Any, ids: torch.Tensor, out: str) -> None:
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        computed = logits(gpt, ids)
        if dist.get_rank() == 0:
            torch.save(computed, Path(out) / "logits.pt")


def save(sharded: dict[str, Any], out: str) -> None:
    saved = Path(out) / "saved"
    saved.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(sharded, str(saved))


def check(checkpoint: str, out: str, ids: torch.Tensor, tp: int, pp: int) -> None:
    gpt, metadata = load(checkpoint, tp, pp)
    compute(gpt, ids, out)
    save(gpt.sharded_state_dict(metadata=metadata), out)


def rank(index: int, check: Callable[..., None], ids_file: str, tp: int, pp: int, cases: list[list[str]]) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    start(tp, pp)
    for case in cases:
        check(*case, torch.load(ids_file), tp, pp)
        dist.barrier()
        if index == 0:
            (Path(case[-1]) / "done").touch()
        gc.collect()  # nothing of this model's is left to the next
    dist.destroy_process_group()


def run(check: Callable[..., None], paths: int) -> None:
    """The command line, with so many paths a case, on ranks forked from here: nothing is imported twice."""
    (ids_file, tp, pp), given = sys.argv[1:4], sys.argv[4:]
    cases = [given[i : i + paths] for i in range(0, len(given), paths)]
    world_size = int(tp) * int(pp)
    os.environ["WORLD_SIZE"] = str(world_size)
    arguments = (check, ids_file, int(tp), int(pp), cases)
    torch.multiprocessing.start_processes(rank, arguments, world_size, start_method="fork")


def main() -> None:
    run(check, 2)
