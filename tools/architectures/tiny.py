"""A tiny config of any of transformers' model types, shrunk from its default one.

In: a model type.  Out: a config of three layers and some hundred thousand parameters.  By the names that transformers
gives sizes, so that types of tomorrow are shrunk too; the few that hold sizes in another form are named.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

WORDS = 128
SIZES = {
    64: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width out_hidden_size "
    "vision_output_dim",
    96: "intermediate_size ffn_dim d_ff dff ffn_hidden_size dim_feedforward dim_ff",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head image_size",
    3: "num_hidden_layers n_layer n_layers num_layers",
    2: "encoder_layers decoder_layers depth num_key_value_heads num_global_key_value_heads num_experts_per_tok moe_k "
    "mamba_expand linear_num_key_heads index_n_heads eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads time_step_rank linear_num_value_heads",
    16: "head_dim global_head_dim kv_lora_rank q_lora_rank sliding_window attention_window_size linear_key_head_dim "
    "linear_value_head_dim index_head_dim patch_size",
    8: "qk_rope_head_dim qk_nope_head_dim v_head_dim hidden_size_per_layer_input mamba_d_state state_size index_topk "
    "rotary_dim",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
    WORDS: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "vocab_size_per_layer_input",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
A_LAYER_EACH = ("layer_types", "attention_types", "layers_block_type", "mlp_layer_types")
PER_LAYER = {"gemma4": ("head_dim",), "dots3": ("num_attention_heads",)}  # read-only: layers differ in it


def tiny_config(kind: str) -> Any:
    """Raises whatever the type's own checks raise."""
    config = _shrink(CONFIG_MAPPING[kind]())
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _shrink(config: Any) -> Any:
    kept = [name for start, names in PER_LAYER.items() if str(config.model_type).startswith(start) for name in names]
    for name, value in list(config.to_dict().items()):
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if name in SMALL and name not in kept and (known or (value is None and name != "num_key_value_heads")):
            with contextlib.suppress(Exception):  # some are computed
                setattr(config, name, SMALL[name])
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif name in A_LAYER_EACH and isinstance(value, list):
            setattr(config, name, value[-SMALL["num_hidden_layers"] :])
    return config
