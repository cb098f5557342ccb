"""How the model families' names on disk become those in memory: (pattern, replacement), applied in order.

Sources: transformers/conversion_mapping.py (5.24.0) and the models' classes (4.57.6 to 5.24.0).
"""

from __future__ import annotations

from typing import NamedTuple

Rename = tuple[str, str]


class Block(NamedTuple):
    """Linears that are one tensor on disk, its rows in their order (`Chunk` and `Split` of the mapping).

    tensor: a pattern of that tensor's canonical name. linears: what stands there for each Linear.
    shares: the config's fields that the rows are divided in proportion to; equally where there are none.
    """

    tensor: str
    linears: tuple[str, ...]
    shares: tuple[str, ...] = ()


def _qkv(tensor: str, module: str = "self_attn", shares: tuple[str, ...] = ()) -> Block:
    return Block(tensor, tuple(f".{module}.{name}_proj." for name in "qkv"), shares)


MIXTRAL: tuple[Rename, ...] = ((r"\.block_sparse_moe\.", ".mlp."),)
W132: tuple[Rename, ...] = ((r"\.w1\.", ".gate_proj."), (r"\.w3\.", ".up_proj."), (r"\.w2\.", ".down_proj."))
FORGET_GATE: tuple[Rename, ...] = (
    (r"\.self_attn\.(A_log|dt_bias|f_a_proj\.weight|f_b_proj\.weight)$", r".self_attn.forget_gate.\1"),
)
HYPER: tuple[Rename, ...] = ((r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),)
SCORE_BIAS = ".gate.e_score_correction_bias"

GRANITE: tuple[Rename, ...] = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.router\.layer\.", ".router."),
)
ARIA: tuple[Rename, ...] = (
    (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
)
BAILING: tuple[Rename, ...] = (
    (
        r"\.attention\.(A_log|dt_bias|f_a_proj\.weight|f_b_proj\.weight|f_proj.*)$",
        r".self_attn.forget_gate.\1",
    ),
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.attention\.", ".self_attn."),
    (r"\.gate\.expert_bias$", SCORE_BIAS),
    (r"^word_embeddings\.", "embed_tokens."),
)
DEEPSEEK_V4: tuple[Rename, ...] = (
    (r"^head\.", "lm_head."),
    (r"^embed\.", "embed_tokens."),
    (r"\.attn\.attn_sink$", ".self_attn.sinks"),
    (r"\.attn\.", ".self_attn."),
    (r"\.compressor\.ape$", ".compressor.position_bias"),
    (r"\.compressor\.norm\.", ".compressor.kv_norm."),
    (r"\.self_attn\.norm\.", ".self_attn.kv_norm."),
    (r"\.self_attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.w([qo])_([ab])\.", r".\1_\2_proj."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.ffn\.", ".mlp."),
    *W132,
    *HYPER,
)
HY_V4: tuple[Rename, ...] = (
    (r"\.hc_pre\.hc_attn_layer\.hc_", ".attn_hc."),
    (r"\.hc_pre\.hc_mlp_layer\.hc_", ".ffn_hc."),
    (r"^hc_pre\.hc_head\.hc_head_", "hc_head.hc_"),
    (r"\.hc_pre\.hc_head_", ".hc_"),
    (r"\.linear_gate\.", ".gate_proj."),
    (r"\.learnable_sink_param$", ".sinks"),
)
INKLING: tuple[Rename, ...] = (
    (r"^unembed\.", "lm_head."),
    (r"^embed\.", "embed_tokens."),
    (r"^embed_norm\.", "embed_tokens.embed_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.experts\.w2_weight$", ".experts.down_proj"),
    (r"\.mlp\.gate\.bias$", f".mlp{SCORE_BIAS}"),
)
INKLING_1: tuple[Rename, ...] = (
    *INKLING,
    (r"\.wq_du\.", ".q_proj."),
    (r"\.wk_dv\.", ".k_proj."),
    (r"\.wv_dv\.", ".v_proj."),
    (r"\.wo_ud\.", ".o_proj."),
    (r"\.wr_du\.", ".r_proj."),
    (r"\.([kv]|attn|mlp)_sconv\.(?!conv1d)", r".\1_sconv.conv1d."),
    (r"\.shared_w2_weight$", ".down_proj"),
)
INKLING_2: tuple[Rename, ...] = (
    *INKLING,
    (r"^attn_res\.output_query", "final_input.query"),
    (r"\.wq_du\.", ".q_proj.linear."),
    (r"\.wk_dv\.", ".k_proj.linear."),
    (r"\.wv_dv\.", ".v_proj.linear."),
    (r"\.wo_ud\.", ".o_proj.linear."),
    (r"\.wr_du\.", ".relative_position_bias.linear."),
    (r"\.self_attn\.([kv])_sconv\.", r".self_attn.\1_proj.sconv.conv1d."),
    (r"\.q_l2_clip\.", ".q_proj.norm."),
    (r"\.rel_l2_clip\.", ".relative_position_bias.norm."),
    (r"\.rel_logits_proj\.", ".relative_position_bias."),
    (r"\.gate_attn\.", ".o_proj.gate_proj."),
    (r"\.attn_sink_proj\.", ".sink_proj."),
    (r"\.attn_sconv\.", ".post_attention_convolution.conv1d."),
    (r"\.mlp_sconv\.", ".post_mlp_convolution.conv1d."),
)
MISTRAL_LARGE4: tuple[Rename, ...] = (
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^lerope\.", "rotary_emb."),
    (r"^(layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(layers\.\d+)\.feed_forward\.", r"\1.mlp."),
    (r"^(layers\.\d+)\.(experts|shared_experts|gate)\.", r"\1.mlp.\2."),
    # Of the text model alone: transformers permutes the rows of the vision model's.
    (r"^(layers\.\d+\.self_attn)\.wq\.", r"\1.q_proj."),
    (r"\.wo\.", ".o_proj."),
    (r"\.wkv_b\.", ".kv_b_proj."),
    (r"\.wkv_a_with_mqa\.", ".kv_a_proj_with_mqa."),
    (r"\.kv_a_norm\.", ".kv_a_layernorm."),
    (r"\.ssmax_scaling\.s$", ".softmax_scaling.scale"),
    (r"\.ssmax_scaling\.b$", ".softmax_scaling.bias"),
    *W132,
)
STEP3P7: tuple[Rename, ...] = (
    (r"\.moe\.(gate|up|down)_proj\.weight$", r".mlp.experts.\1_proj"),
    (r"\.moe\.router_bias$", f".mlp{SCORE_BIAS}"),
    (r"\.moe\.", ".mlp."),
    (r"\.share_expert\.", ".mlp.shared_experts."),
)

EXAONE: tuple[Rename, ...] = (
    (r"^transformer\.wte\.", "embed_tokens."),
    (r"^transformer\.h\.", "layers."),
    (r"^transformer\.ln_f\.", "norm."),
    (r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj."),
    (r"\.attn\.attention\.", ".self_attn."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
    (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
)
COSMOS3: tuple[Rename, ...] = (
    (r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.to_out\.", ".self_attn.o_proj."),
    (r"\.self_attn\.norm_([qk])\.", r".self_attn.\1_norm."),
    (r"^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\.", r"visual.\1."),
)
COSMOS3_EDGE: tuple[Rename, ...] = (
    *COSMOS3,
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
GTE: tuple[Rename, ...] = (
    (r"^(new|gte)\.", ""),
    (r"\bencoder\.layer\.", "layers."),
    (r"\.attention\.o_proj\.", ".self_attn.o_proj."),
    (r"\.attn_ln\.", ".post_attention_layernorm."),
    (r"\.mlp_ln\.", ".post_mlp_layernorm."),
    (r"^lm_head\.norm\.", "lm_head.layer_norm."),
)
GTE_BLOCKS = (
    _qkv(r"\.attention\.qkv_proj\."),
    Block(r"\.mlp\.up_gate_proj\.", (".mlp.up_proj.", ".mlp.gate_proj.")),
)
JINA_V3: tuple[Rename, ...] = (
    (r"^(roberta|bert|nomic_bert)\.", ""),
    (r"\bemb_ln\.", "embeddings.LayerNorm."),
    (r"\bencoder\.layers\.", "layers."),
    (r"\.(mixer|attn)\.out_proj\.", ".self_attn.o_proj."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
NOMIC: tuple[Rename, ...] = (
    *JINA_V3,
    (r"\.fc11\.", ".up_proj."),
    (r"\.fc12\.", ".gate_proj."),
    (r"\.fc2\.", ".down_proj."),
)
QIANFAN: tuple[Rename, ...] = (
    (r"^vision_model\.", "vision_tower."),
    (r"\bencoder\.layers\.", "layers."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.embeddings\.class_embedding$", ".embeddings.cls_token"),
    (r"\.embeddings\.position_embedding$", ".embeddings.position_embeddings"),
    (r"\.embeddings\.patch_embedding\.", ".embeddings.patch_embeddings.projection."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
)
WQKV = (_qkv(r"\.(mixer|attn)\.Wqkv\."),)
QIANFAN_BLOCKS = (_qkv(r"\.attn\.qkv\.", "attention"),)
HRM: tuple[Rename, ...] = ((r"\.attn\.o_proj\.", ".self_attn.o_proj."),)
HRM_BLOCKS = (
    Block(r"\.mlp\.gate_up_proj\.", (".mlp.gate_proj.", ".mlp.up_proj.")),
    Block(r"\.attn\.gqkv_proj\.", tuple(f".self_attn.{name}_proj." for name in ("gate", "q", "k", "v"))),
)
SARVAM_BLOCKS = (
    _qkv(
        r"\.self_attn\.query_key_value\.",
        shares=("num_attention_heads", "num_key_value_heads", "num_key_value_heads"),
    ),
)

QKV: tuple[Rename, ...] = tuple(
    (rf"\battention\.(attention|self)\.{name}\b", f"attention.{name[0]}_proj")
    for name in ("query", "key", "value")
)
DINOV2: tuple[Rename, ...] = (*QKV, (r"\battention\.output\.dense\b", "attention.o_proj"))
SWIN: tuple[Rename, ...] = (
    *DINOV2,
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
VIT: tuple[Rename, ...] = ((r"encoder\.layer\b", "layers"), *SWIN)
SEGFORMER: tuple[Rename, ...] = (
    *DINOV2,
    (r"\bencoder\.block\.(\d+)\b", r"stages.\1.blocks"),
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
)
