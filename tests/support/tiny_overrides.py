"""What `tiny` needs to know of configs: data only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAMILIES: tuple[str, ...] = (
    *("afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx"),
    *("deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma"),
    *("doge", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe"),
    *("flex_olmo", "flint", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
    *("glm4v_moe_text", "glm5_next", "glm5_next_text", "glm_moe_dsa", "gpt_oss", "granitemoe"),
    *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4"),
    *("hy_v4_vl", "hy_v4_vl_text", "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text"),
    *("inkling_mm_model", "inkling_text", "jamba", "jetmoe", "kimi_k25", "kimi_linear", "kolibri1"),
    *("laguna", "lara_mini", "lfm2_moe", "llama4", "llama4_text", "longcat_flash", "mellum"),
    *("mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "mistral4"),
    *("mistral_large4", "mistral_large4_text", "mixtral", "muse_spark", "muse_spark_text", "nemotron_h"),
    *("nllb-moe", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    *("qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp", "qwen4_exp_text", "sarvam_mla", "sarvam_moe"),
    *("solar_open", "step3p7", "switch_transformers", "unlimited_ocr", "zaya"),
)
"""Model types with routed experts and a registered model class, in any supported transformers."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size")
NEVER_NONE = frozenset({*EXPERT_COUNTS, "moe_intermediate_size", "num_experts_per_tok", "top_k_experts"})
"""Fields that some configs leave empty by default, though a mixture of experts needs them."""
TEXT_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size", "dense_intermediate_size", "d_ff")

SIZES: Mapping[str, Any] = {
    # widths
    "d_model": 32,
    "n_embd": 32,
    "d_kv": 16,
    "decoder_ffn_dim": 28,
    "encoder_ffn_dim": 36,
    "mlp_dim": 36,
    "moe_shared_expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "share_expert_dim": 24,
    "moe_hidden_size": 24,
    "moe_latent_size": 24,
    "router_hidden_size": 16,
    "head_dim": 16,
    "kv_channels": 16,
    "swa_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "o_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "unpadded_vocab_size": 96,
    # vision, audio and projectors
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "thinker_hidden_size": 32,
    "output_dim": 32,
    "projector_hidden_size": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "projection_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 36,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "decoder_dim": 32,
    "downsample_hidden_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
    # depths and counts
    "num_hidden_layers": 2,
    "n_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "n_heads": 2,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "index_n_heads": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "zero_expert_num": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    # special tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
"""The size of every config field of that name, wherever the field has a value by default."""

_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_NO_LAYER_CONFIG: Mapping[str, Any] = {"per_layer_config": {}}
_GROUPS = {"n_group": 1, "topk_group": 1}
_LINEAR_HEADS = {"linear_head_dim": 16, "linear_num_heads": 2}
_SAM = {"global_attn_indexes": [1], "downsample_channels": [16, 32], "output_channels": 16}
_NGRAMS = {"hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 32, "heads_per_ngram": 2}
_GEMMA = {**_NO_LAYER_CONFIG, **_SLIDING_THEN_FULL}
_HALF_ROTARY = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
_GLM4V = {"partial_rotary_factor": 0.5, "rope_scaling": {**_HALF_ROTARY, "mrope_section": [2, 1, 1]}}
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 2, 2]}
_QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_GLM5_NEXT = {
    "qk_rope_head_dim": 0,
    "qk_nope_head_dim": 16,
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_types": ["full", "full"],
    **_DENSE_THEN_SPARSE,
    **_LINEAR_HEADS,
}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {**_LINEAR_THEN_FULL, **_LINEAR_HEADS},
    "beam": _DENSE_THEN_SPARSE,
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **_GROUPS},
    "deepseek_ocr2_sam_vision_model": {**_SAM, "scale": 1},
    "deepseek_v2": _GROUPS,
    "diffusion_gemma_text": _GEMMA,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"],
        **_NO_LAYER_CONFIG,
    },
    "dots3_note_vision_encoder": {**_NO_LAYER_CONFIG, **_DENSE_THEN_SPARSE},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [20, 12],
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_vision": {"position_embedding_size": 16},
    "gemma4_text": {"enable_moe_block": True, **_GEMMA},
    "glm4v_moe_text": _GLM4V,
    "Glm4vMoe_text": _GLM4V,
    "glm5_next": {"text_config": _GLM5_NEXT},
    "glm5_next_text": _GLM5_NEXT,
    "glm_moe_dsa": _DENSE_THEN_SPARSE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v4_vl_vision": {"max_image_size": 32},
    "hy_v4_vl_text": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1]}
    },
    "inkling_audio": {"mel_vocab_size": 8},
    "inkling_vision": {"n_layers": 4, "patch_size": 2},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"num_key_value_heads": 1},
    "kimi_linear": {**_LINEAR_THEN_FULL, **_LINEAR_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mimo_v2_flash": {
        "num_attention_heads": 4,
        "rope_parameters": dict.fromkeys(_SLIDING_THEN_FULL["layer_types"], _HALF_ROTARY),
    },
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "patch_sizes": [4, 3, 3, 2],
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
    },
    "nemotron_h": {"n_groups": 2},
    "qwen3_5_moe_text": _LINEAR_THEN_FULL,
    "qwen3_next": _LINEAR_THEN_FULL,
    "qwen3_omni_moe": {"enable_audio_output": False, "talker_config": ..., "code2wav_config": ...},
    "qwen3_omni_moe_text": {"rope_scaling": _MROPE},
    "qwen3_vl_moe_text": {"rope_scaling": _MROPE},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], **_NGRAMS, **_QWEN4_INDEXER},
    "step3p5": {"sliding_window": 8, **_DENSE_THEN_SPARSE},
    "unlimited_ocr_sam_vision_model": _SAM,
    "zaya": {"num_experts_per_tok": 1},
}
"""What a model type needs beyond SIZES; `...` drops a field. Applies also where it is a nested config."""
