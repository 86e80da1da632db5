"""Tiny randomly initialised models of the decoder families in transformers, one row of a table each."""

import dataclasses

import pytest
import torch
import transformers

# what configs call their sizes: a config is given those of its fields that stand here
_SIZES = {
    "vocab_size": 97,
    "decoder_vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "unpadded_vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "max_position_embeddings": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    # widths
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "shared_intermediate_size": 24,
    "prefix_dense_intermediate_size": 48,
    "feed_forward_size": 48,
    "dim_ff": 48,
    "dff": 48,
    "d_inner": 48,
    "block_multiple_of": 8,
    "word_embed_proj_dim": 32,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "gated_norm_rank": 8,
    # layers
    "num_hidden_layers": 3,
    "decoder_layers": 3,
    "encoder_layers": 3,
    "num_decoder_layers": 3,
    "num_encoder_layers": 3,
    "n_layers_per_attn_res_block": 1,
    # heads
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "dim_head": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "local_attention": 8,
    "window_size": 8,
    "attention_chunk_size": 64,
    "max_window_layers": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rotary_dim": 8,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "d_rel": 4,
    "rel_extent": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "zero_expert_num": 2,
    "router_hidden_size": 8,
    "first_k_dense_replace": 1,
    # linear attention, convolutions, state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_mamba_heads": 2,
    "n_groups": 1,
    "chunk_size": 8,
    "lru_width": 32,
    "attention_window_size": 8,
    "conv_L_cache": 3,
    "adapter_rank": 4,
}
# the same for towers of images and sounds
_TOWER = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "encoder_layers": 1,
    "num_global_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
    "encoder_ffn_dim": 48,
    "out_hidden_size": 32,
    "output_hidden_size": 32,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "text_hidden_size": 32,
    "downsample_hidden_size": 16,
    "output_dim": 32,
    "num_mel_bins": 16,
    "num_position_embeddings": 16,
    "max_source_positions": 64,
    "position_embedding_size": 16,
    "mm_embed_dim": 32,
    "vocab_size": 97,
    "model_patch_size": 28,
    "conv_hidden_size": 8,
    "adapter_intermediate_size": 48,
    "dff": 48,
    "num_codebooks": 2,
    "base_channels": 32,
    "num_res_blocks": 1,
    "channel_multiplier": [1, 1],
    "codebook_size": 16,
}
_TOWER_TYPES = ("vit",)
_TOWERS = ("vision", "audio", "vq", "encoder", "speech", "perceiver", "qformer", "projector", "sam", "vit")


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    model_type: the config's name. changes: what differs from the sizes; those of a nested config as a dict under its
    name, with "model_type" in it where it is to be another one. model: the class, by default the one of the auto
    class for language models, or for models of images and text.
    """

    model_type: str
    changes: dict
    model: str | None = None


def _row(name: str, _type: str | None = None, _model: str | None = None, /, **changes) -> tuple[str, Family]:
    return name, Family(_type or name, changes, _model)


# latent attention has as many heads of keys and values as of queries
_MLA = {"num_key_value_heads": 4}
_SQUARE = {"head_dim": 8}
# weights so large that a convolution or a state carries something over, as trained ones do
_MIXING = {"initializer_range": 0.2}
# encoders of their own kind, with a causal mask
_CAUSAL = {"is_decoder": True}
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_LINEAR_LAST, _FULL_LAST = [_FULL, _FULL, _LINEAR], [_LINEAR, _FULL, _FULL]

_ROWS: dict[str, Family] = dict(
    (
        _row("afmoe"),
        _row("apertus"),
        _row("arcee"),
        _row("aria"),
        _row("aria_text"),
        _row("axk1", **_MLA),
        _row("axk2", **_MLA),
        _row("aya_vision"),
        _row("bailing_hybrid", **_MLA, layer_types=_FULL_LAST),
        _row("bamba", attn_layer_indices=[1]),
        _row("bamba attention last", "bamba", attn_layer_indices=[0, 2]),
        _row("bart"),
        _row("beam"),
        _row("bert", **_CAUSAL),
        _row("bert-generation", **_CAUSAL),
        _row("big_bird", **_CAUSAL, attention_type="original_full"),
        _row("bigbird_pegasus", attention_type="original_full"),
        _row("biogpt"),
        _row("bitnet"),
        _row("blenderbot"),
        _row("blenderbot-small"),
        _row("bloom"),
        _row("bloom residual", "bloom", apply_residual_connection_post_layernorm=True),
        _row("camembert", **_CAUSAL),
        _row("chameleon", vocabulary_map={"<image>": 5}),
        _row("codegen"),
        _row("cohere"),
        _row("cohere2"),
        _row("cohere2_moe"),
        _row("cohere2_vision", alignment_intermediate_size=48),
        _row(
            "cohere_compass_text",
            layer_types=[_SLIDING, _SLIDING, _FULL],
            rope_parameters={
                _SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
                _FULL: None,
            },
        ),
        _row("cosmos3_omni"),
        _row("cpmant"),
        _row("ctrl"),
        _row("cwm"),
        _row("data2vec-text", **_CAUSAL),
        _row(
            "dbrx",
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        ),
        _row("deepseek_v2", **_MLA),
        _row("deepseek_v3", **_MLA),
        _row("deepseek_v3 dense query", "deepseek_v3", **_MLA, q_lora_rank=None),
        _row("deepseek_v32", **_MLA),
        _row("deepseek_v4"),
        _row("deepseek_vl"),
        _row("diffllama"),
        _row("doge"),
        _row("dots1"),
        _row(
            "dots3_note_text",
            **_MLA,
            swa_q_lora_rank=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_head_dim=16,
            swa_qk_nope_head_dim=8,
            swa_v_head_dim=12,
        ),
        _row("electra", **_CAUSAL),
        _row("emu3", vocabulary_map={"<image>": 5}),
        _row("ernie", **_CAUSAL),
        _row("ernie4_5"),
        _row("ernie4_5_moe"),
        _row("evolla"),
        _row("exaone4"),
        _row("exaone4_5"),
        _row("exaone_moe"),
        _row("falcon"),
        _row("falcon alibi", "falcon", alibi=True, multi_query=False, num_kv_heads=4),
        _row("falcon new decoder", "falcon", new_decoder_architecture=True),
        _row("falcon_h1"),
        _row("falcon_mamba"),
        _row("flex_olmo"),
        _row("flint"),
        _row("fuyu"),
        _row("gemma"),
        _row("gemma2"),
        _row("gemma3"),
        _row("gemma3_text"),
        _row("gemma3_text mixed", "gemma3_text", layer_types=[_SLIDING, _FULL, _SLIDING]),
        _row(
            "gemma3n_text",
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=[_SLIDING, _FULL, _SLIDING, _FULL],
            activation_sparsity_pattern=[0.0] * 4,
        ),
        _row("gemma4", text_config={"global_head_dim": 24}),
        _row(
            "gemma4_text",
            num_hidden_layers=4,
            layer_types=[_SLIDING, _FULL, _SLIDING, _FULL],
            global_head_dim=24,
            num_global_key_value_heads=2,
        ),
        _row(
            "gemma4_text experts",
            "gemma4_text",
            global_head_dim=24,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
        ),
        _row(
            "gemma4_text shared keys",
            "gemma4_text",
            global_head_dim=24,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=[_SLIDING, _FULL, _SLIDING, _FULL],
        ),
        _row("gemma4_unified", text_config={"global_head_dim": 24}),
        _row("gemma4_unified_text", global_head_dim=24),
        _row("git"),
        _row("glm"),
        _row("glm4"),
        _row("glm46v", text_config=_MROPE),
        _row("glm4_moe"),
        _row("glm4_moe_lite", **_MLA),
        _row("glm4v", text_config=_MROPE),
        _row("glm4v_moe", text_config={"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}),
        _row("glm_moe_dsa", **_MLA),
        _row("glm_ocr", text_config=_MROPE),
        _row("glmasr"),
        _row("got_ocr2"),
        _row("gpt2"),
        _row("gpt_bigcode"),
        _row("gpt_bigcode many keys", "gpt_bigcode", multi_query=False),
        _row("gpt_neo", attention_types=[[["global", "local"], 1]], num_layers=2),
        _row("gpt_neox"),
        _row("gpt_neox_japanese"),
        _row("gpt_oss"),
        _row("gptj"),
        _row("granite"),
        _row("granite_docling", vision_config={"out_hidden_size": 32}),
        _row("granite_speech"),
        _row("granite_speech_plus"),
        _row("granite_swa"),
        _row("granitemoe"),
        _row("granitemoe_swa"),
        _row("granitemoehybrid", layer_types=["mamba", "attention", "attention"]),
        _row("granitemoehybrid mamba last", "granitemoehybrid", layer_types=["attention", "attention", "mamba"]),
        _row("granitemoeshared"),
        _row("helium", **_SQUARE),
        _row("hrm_text"),
        _row("hunyuan_v1_dense"),
        _row("hunyuan_v1_moe"),
        _row("hy_v3"),
        _row("hy_v4"),
        _row("hyperclovax"),
        _row("hyperclovax_vision_v2"),
        _row("idefics2"),
        _row("idefics3"),
        _row("inkling2_text"),
        _row("inkling_text"),
        _row("internlm3"),
        _row("internvl"),
        _row("iquestcoder"),
        _row("jais2"),
        _row("jamba", attn_layer_period=2, attn_layer_offset=1, num_hidden_layers=4, use_mamba_kernels=False),
        _row("jamba mamba last", "jamba", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        _row("jetmoe"),
        _row("kimi_k25", text_config=_MLA),
        _row("kimi_linear", **_MLA, layer_types=_FULL_LAST),
        _row("kimi_linear linear last", "kimi_linear", **_MLA, layer_types=_LINEAR_LAST),
        _row("kolibri1"),
        _row("kosmos-2.5"),
        _row("laguna"),
        _row("lfm2", layer_types=["conv", _FULL, "conv"], **_MIXING),
        _row("lfm2 attention last", "lfm2", layer_types=["conv", _FULL, _FULL], **_MIXING),
        _row("lfm2_moe", layer_types=["conv", _FULL, _FULL], num_dense_layers=1, **_MIXING),
        _row("lfm2_vl"),
        _row("lfm3"),
        _row("lfm3_vl"),
        _row("lighton_ocr"),
        _row("llama"),
        _row("llama biased", "llama", attention_bias=True),
        _row("llama tied", "llama", tie_word_embeddings=True),
        _row("llama4", None, "Llama4ForConditionalGeneration"),
        _row("llama4_text"),
        _row("llava"),
        _row("llava_next"),
        _row("llava_next_video"),
        _row("llava_onevision"),
        _row("longcat_flash", **_MLA, num_layers=2, head_dim=8),
        _row("mamba"),
        _row("mamba2", num_heads=4, head_dim=16),
        _row("marian"),
        _row("mbart"),
        _row("megatron-bert", **_CAUSAL),
        _row("mellum"),
        _row("mimo_v2_flash"),
        _row("minicpm3", **_MLA),
        _row("minicpm_ocr", text_config={"layer_types": _FULL_LAST}),
        _row("minicpmv4_6", text_config={"layer_types": _FULL_LAST}),
        _row("minicpmv4_7", text_config={"layer_types": _FULL_LAST}),
        _row("minimax", layer_types=_FULL_LAST),
        _row("minimax linear last", "minimax", layer_types=_LINEAR_LAST),
        _row("minimax_m2"),
        _row("minimax_m3_vl"),
        _row("minimax_m3_vl_text"),
        _row("ministral"),
        _row("ministral3"),
        _row("mistral"),
        _row("mistral3"),
        _row("mistral4", None, "Mistral4ForCausalLM", **_MLA),
        _row("mistral_large4", text_config=_MLA),
        _row("mixtral"),
        _row("mllama"),
        _row("mllama_text_model", None, "MllamaForCausalLM", num_hidden_layers=4, cross_attention_layers=[1]),
        _row("modernbert-decoder"),
        _row("moshi"),
        _row("moss_transcribe_diarize"),
        _row("mpt"),
        _row("mvp"),
        _row("nanochat"),
        _row("nemotron"),
        _row("nemotron_h"),
        _row("olmo"),
        _row("olmo2"),
        _row("olmo3"),
        _row("olmo_hybrid", layer_types=_FULL_LAST, **_MIXING),
        _row("olmo_hybrid linear last", "olmo_hybrid", layer_types=_LINEAR_LAST, **_MIXING),
        _row("olmoe"),
        _row("openai-gpt"),
        _row("opt"),
        _row("opt projected", "opt", word_embed_proj_dim=16, do_layer_norm_before=False),
        _row("ovis2"),
        _row("paddleocr_vl", text_config=_MROPE | _SQUARE),
        _row("paligemma"),
        _row("pegasus"),
        _row("persimmon"),
        _row("phi"),
        _row("phi3"),
        _row("phi3 sliding", "phi3", sliding_window=8),
        _row("phimoe"),
        _row("plbart"),
        _row("prophetnet"),
        _row("qianfan_ocr"),
        _row("qwen2"),
        _row("qwen2 sliding", "qwen2", use_sliding_window=True),
        _row("qwen2_5_omni_thinker", text_config=_MROPE),
        _row("qwen2_5_vl", text_config=_MROPE),
        _row("qwen2_audio"),
        _row("qwen2_moe"),
        _row("qwen2_vl", text_config=_MROPE),
        _row("qwen3"),
        _row("qwen3_5", text_config={"layer_types": _FULL_LAST}),
        _row("qwen3_5_moe", text_config={"layer_types": _FULL_LAST}),
        _row("qwen3_5_moe_text", layer_types=_FULL_LAST),
        _row("qwen3_5_text", layer_types=_FULL_LAST),
        _row("qwen3_5_text linear last", "qwen3_5_text", layer_types=_LINEAR_LAST),
        _row("qwen3_asr"),
        _row("qwen3_moe"),
        _row("qwen3_next", layer_types=_FULL_LAST, **_MIXING),
        _row("qwen3_next linear last", "qwen3_next", layer_types=_LINEAR_LAST, **_MIXING),
        _row("qwen3_omni_moe_thinker"),
        _row("qwen3_vl"),
        _row("qwen3_vl_moe"),
        _row(
            "qwen4_exp_text",
            layer_types=_FULL_LAST,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=16,
            indexer_budget=8,
            indexer_compress_ratio=2,
        ),
        _row("recurrent_gemma"),
        _row(
            "reformer",
            **_CAUSAL,
            attn_layers=["local", "lsh", "local"],
            axial_pos_shape=[8, 8],
            axial_pos_embds_dim=[16, 16],
            attention_head_size=16,
            local_attn_chunk_length=8,
            lsh_attn_chunk_length=8,
            hash_seed=0,
        ),
        _row("rembert", **_CAUSAL),
        _row("roberta", **_CAUSAL),
        _row("roberta-prelayernorm", **_CAUSAL),
        _row(
            "roc_bert",
            **_CAUSAL,
            pronunciation_embed_dim=8,
            pronunciation_vocab_size=9,
            shape_embed_dim=8,
            shape_vocab_size=9,
        ),
        _row("roformer", **_CAUSAL),
        _row("rwkv"),
        _row("seed_oss"),
        _row("smollm3"),
        _row("smolvlm"),
        _row("solar_open"),
        _row("stablelm"),
        _row("starcoder2"),
        _row("step3p7"),
        _row("trocr"),
        _row("vaultgemma"),
        _row("video_llama_3"),
        _row("video_llava"),
        _row("vipllava"),
        _row("voxtral"),
        _row("whisper"),
        _row("xglm"),
        _row("xlm"),
        _row("xlm-roberta", **_CAUSAL),
        _row("xlm-roberta-xl", **_CAUSAL),
        _row("xlnet"),
        _row("xmod", **_CAUSAL, default_language="en_XX"),
        _row("youtu", **_MLA),
        _row(
            "zamba",
            initializer_range=0.5,
            num_hidden_layers=6,
            attn_layer_period=3,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            num_key_value_heads=4,
            attention_hidden_size=64,
            attention_head_dim=16,
        ),
        _row(
            "zamba2",
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            use_mem_rope=True,
            num_key_value_heads=4,
            attention_hidden_size=64,
            attention_head_dim=16,
            use_mamba_kernels=False,
        ),
        _row("zaya", num_experts_per_tok=1),
    )
)
FAMILY_NAMES = tuple(_ROWS)


def tiny_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model of the family in eval mode: vocabulary of 97, 2 to 4 layers, 4 heads, hidden 32 where it can."""
    import transformers

    config = family_config(name)
    torch.manual_seed(seed)
    model = getattr(transformers, _ROWS[name].model or _class_of(_ROWS[name].model_type))(config)
    return model.to(dtype).eval()


def family_config(name: str):
    """The tiny config of a family."""
    return tiny_config(_ROWS[name].model_type, **_ROWS[name].changes)


def tiny_config(model_type: str, **changes):
    """A config of this type with tiny sizes, and the changes; a tower's sizes where it is a tower's."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return _config(CONFIG_MAPPING[model_type], _TOWER if model_type in _TOWER_TYPES else _SIZES, changes)


def _class_of(model_type: str) -> str:
    from transformers.models.auto import modeling_auto as auto

    # a wrapper's own class, where the other list has its language model's
    known = (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return next(names[model_type] for names in known if model_type in names)


def _config(kind: type, sizes: dict, changes: dict):
    """A config of this class with those of the sizes that it knows, and the changes; nested configs likewise."""
    from transformers import CONFIG_MAPPING

    known = {field.name for field in dataclasses.fields(kind)}
    values = {
        named: size
        for name, size in sizes.items()
        for named in {name, kind.attribute_map.get(name, name)}
        if named in known
    }
    values |= changes
    usual = None
    for name, nested in kind.sub_configs.items():
        differs = dict(values.get(name) or {})
        if "model_type" in differs:
            nested = CONFIG_MAPPING[differs.pop("model_type")]
        elif not dataclasses.is_dataclass(nested) or nested.__name__ == "AutoConfig":
            usual = usual or kind()
            nested = type(getattr(usual, name))
            if nested is type(None):
                continue
        tower = any(part in name for part in _TOWERS)
        values[name] = _config(nested, _TOWER if tower else _SIZES, differs)
    return kind(**values)
