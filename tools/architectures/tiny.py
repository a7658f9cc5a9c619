"""A tiny config of any of transformers' model types, shrunk from its default one.

In: a model type.  Out: a config of three layers and some hundred thousand parameters.  By the names that transformers
gives sizes, so that types of tomorrow are shrunk too; what is odd about a few types is named.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

WORDS = 128
SIZES = {
    64: "hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim embedding_size lru_width out_hidden_size "
    "vision_output_dim text_hidden_size projection_dim projector_hidden_size hidden_sizes hidden_size_global "
    "encoder_hidden_size moe_hidden_size moe_latent_size adapter_in_dim adapter_out_dim adapter_input_size",
    96: "intermediate_size ffn_dim d_ff dff ffn_hidden_size dim_feedforward dim_ff dense_intermediate_size "
    "shared_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head image_size",
    3: "num_hidden_layers n_layer n_layers num_layers",
    2: "encoder_layers decoder_layers depth depths num_key_value_heads num_global_key_value_heads num_experts_per_tok "
    "moe_k mamba_expand linear_num_key_heads index_n_heads eos_token_id top_k_experts n_groups mamba_n_groups",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads time_step_rank linear_num_value_heads num_groups "
    "num_attention_heads_per_layer index_kpool",
    16: "head_dim global_head_dim kv_lora_rank q_lora_rank sliding_window attention_window_size linear_key_head_dim "
    "linear_value_head_dim index_head_dim patch_size",
    8: "qk_rope_head_dim qk_nope_head_dim v_head_dim hidden_size_per_layer_input mamba_d_state state_size index_topk "
    "rotary_dim",
    1: "n_group topk_group first_k_dense_replace bos_token_id n_shared_experts",
    0: "pad_token_id",
    WORDS: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "vocab_size_per_layer_input mamba_d_ssm encoder_hash_byte_group_vocab",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"]
SAME = {"num_key_value_heads": ("num_attention_heads",), "head_dim": ("qk_rope_head_dim",)}  # kept so if they are
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers")  # of layers, a list each
KEPT = SMALL["num_hidden_layers"]
MROPE = re.compile(r'"mrope_section", \[([\d, ]+)\]')
SWA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
}
ODD: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"patching_threshold": 1.0},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGAZ": 5}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note_text": {f"swa_{name}": size for name, size in SWA.items()},
    "dots3_note_vision": {"pyramid_num_routed": [-1, 2, 4]},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|visual token 000000|>": 5, "<|visual token 000001|>": 6}},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 64},
    "falcon_h1": {"mamba_d_head": 32},
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model", **VISION}},
    "gemma3n_vision": {"architecture": "test_efficientnet"},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
    },
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}},
    "inkling_vision": {"patch_size": 4, "num_hidden_layers": 4},
    "janus_vqgan": {"base_channels": 32},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [2, 1]},
    "perception_lm": {
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "model_args": {"embed_dim": 64}}
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds": False,  # for training of any length, as are chunks of the whole length
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
        "hash_seed": 0,
        "local_attn_chunk_length": WORDS,
        "lsh_attn_chunk_length": WORDS,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}


def tiny_config(kind: str) -> Any:
    """Raises whatever the type's own checks raise."""
    config = _shrunk(CONFIG_MAPPING[kind])
    for name in ("is_decoder", "causal"):
        if hasattr(config, name):
            setattr(config, name, True)
    return config


def _shrunk(build: type[PretrainedConfig], asked: Any = None) -> Any:
    """A config of small sizes and of what was ``asked`` of it; what it derives from these it derives again."""
    odd = ODD.get(build.model_type, {})
    try:
        default = build()
    except Exception:  # its own check refuses it
        default, odd = build(**odd), {}
    full = vars(asked or default)
    settings = {}
    for field in dataclasses.fields(build):
        name = field.name
        if name not in full:
            continue
        value = full[name]
        if isinstance(value, PretrainedConfig):
            settings[name] = _shrunk(type(value), value)
            continue
        small = _smaller(name, value, full)
        derived = field.default is None and value is not None and value == vars(default)[name]
        if derived and name == "num_key_value_heads" and "kv_lora_rank" not in full:
            small = SMALL[name]  # groups, though each head has its own by default
        stated = name == "num_key_value_heads" or name in KINDS  # or else the kinds of the first layers
        if small != field.default and (not derived or (stated and small != value)):
            settings[name] = small
    if sections := _sections(build, full.get("rope_parameters") or {}):
        settings["rope_parameters"] = full["rope_parameters"] | {"mrope_section": sections}
    return build(**(settings | odd))


def _smaller(name: str, value: Any, full: dict[str, Any]) -> Any:
    """A setting of the ``full`` config, in the tiny one."""
    depth = next((full[layers] for layers in LAYERS if isinstance(full.get(layers), int)), 0)
    if isinstance(value, list | tuple):
        if len(value) == depth > KEPT and list(value) != list(range(depth)):  # the layers' numbers are derived
            value = [value[i] for i in _layers(full, depth)]
        return [_size(name, each) for each in value] if name in SMALL else value
    if value == depth and "layers" in name and value:
        return min(depth, KEPT)
    for other in SAME.get(name, ()):
        if value is not None and value == full.get(other):
            name = other
    return _size(name, value) if name in SMALL else value


def _layers(full: dict[str, Any], depth: int) -> list[int]:
    """Three of the ``depth`` layers: the first, the last of each other kind, and the last ones."""
    kinds = [[full[name][i] for name in KINDS if len(full.get(name) or ()) == depth] for i in range(depth)]
    chosen = [0]
    for i in reversed(range(depth)):
        if len(chosen) < KEPT and kinds[i] not in [kinds[j] for j in chosen]:
            chosen.append(i)
    last = [i for i in reversed(range(depth)) if i not in chosen]
    return sorted([*chosen, *last[: KEPT - len(chosen)]])


def _size(name: str, value: Any) -> Any:
    if value is None:
        return SMALL[name]
    return min(value, SMALL[name]) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _sections(build: type[PretrainedConfig], rope: dict[str, Any]) -> list[int] | None:
    """Of a rotary embedding, for time, height and width: half of a head.  Many types have theirs in their code."""
    code = build.__module__.replace("configuration", "modeling")
    named = MROPE.search(inspect.getsource(importlib.import_module(code))) if importlib.util.find_spec(code) else None
    sections = rope.get("mrope_section") or (named and [int(size) for size in named[1].split(",")])
    if not sections or "rope_theta" not in rope:
        return None
    half = int(SMALL["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    fitted = [round(size * half / sum(sections)) for size in sections[:-1]]
    return [*fitted, half - sum(fitted)]
