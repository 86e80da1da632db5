"""Tiny random models of many decoder families, for what the engine must get right or leave alone in each."""

from __future__ import annotations

import inspect

import torch

from lofit_fast.data.encode import IGNORED
from tests.tiny_models import tokens

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "initializer_range": 0.2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "attention_dropout": 0.0,
}
_MLA = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
_MLA |= {"num_key_value_heads": 4, "head_dim": 4}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
_LINEAR |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
_FULL_LAST, _LINEAR_LAST = (
    ["linear_attention", "full_attention", "full_attention"],
    ["full_attention", "full_attention", "linear_attention"],
)
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}
_MAMBA |= {"mamba_chunk_size": 8, "mamba_expand": 2}

# name -> (config class, model class, what differs); the model class defaults to <X>ForCausalLM
FAMILIES: dict[str, tuple[str, str, dict]] = {
    name: (f"{stem}Config", model or f"{stem.removesuffix('Text')}ForCausalLM", differs)
    for name, stem, model, differs in (
        ("llama", "Llama", None, {}),
        ("gemma", "Gemma", None, {}),
        ("gemma2", "Gemma2", None, {"sliding_window": 4}),
        ("gemma3", "Gemma3Text", "Gemma3ForCausalLM", {"sliding_window": 4}),
        (
            "gemma3n",
            "Gemma3nText",
            "Gemma3nForCausalLM",
            {
                "num_kv_shared_layers": 1,
                "sliding_window": 4,
                "vocab_size_per_layer_input": 97,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 4,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "activation_sparsity_pattern": [0.5, 0.0, 0.0],
            },
        ),
        (
            "gemma4",
            "Gemma4Text",
            "Gemma4ForCausalLM",
            {
                "sliding_window": 4,
                "num_kv_shared_layers": 1,
                "vocab_size_per_layer_input": 97,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
        ),
        ("qwen2", "Qwen2", None, {}),
        ("qwen3", "Qwen3", None, {}),
        ("qwen3_moe", "Qwen3Moe", None, {}),
        ("qwen2_moe", "Qwen2Moe", None, {"shared_expert_intermediate_size": 24}),
        (
            "qwen3_next",
            "Qwen3Next",
            None,
            {**_LINEAR, "layer_types": _FULL_LAST, "shared_expert_intermediate_size": 24},
        ),
        (
            "qwen3_next_dense",
            "Qwen3Next",
            None,
            {
                **_LINEAR,
                "layer_types": _LINEAR_LAST,
                "mlp_only_layers": [0, 1, 2],
                "shared_expert_intermediate_size": 24,
            },
        ),
        ("qwen3_5", "Qwen3_5Text", "Qwen3_5ForCausalLM", {**_LINEAR, "layer_types": _LINEAR_LAST}),
        ("qwen3_5_full_last", "Qwen3_5Text", "Qwen3_5ForCausalLM", {**_LINEAR, "layer_types": _FULL_LAST}),
        ("mistral", "Mistral", None, {"sliding_window": 4}),
        ("ministral", "Ministral", None, {"sliding_window": 4}),
        ("mixtral", "Mixtral", None, {}),
        ("phi", "Phi", None, {}),
        ("phi3", "Phi3", None, {}),
        ("phimoe", "Phimoe", None, {}),
        ("cohere", "Cohere", None, {}),
        ("cohere2", "Cohere2", None, {"sliding_window": 4}),
        ("granite", "Granite", None, {}),
        ("granitemoe", "GraniteMoe", None, {}),
        (
            "granitemoehybrid",
            "GraniteMoeHybrid",
            None,
            {**_MAMBA, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 48},
        ),
        ("olmo", "Olmo", None, {}),
        ("olmo2", "Olmo2", None, {}),
        ("olmo3", "Olmo3", None, {"sliding_window": 4}),
        ("olmoe", "Olmoe", None, {}),
        ("smollm3", "SmolLM3", None, {}),
        ("starcoder2", "Starcoder2", None, {"sliding_window": 4}),
        ("stablelm", "StableLm", None, {}),
        ("persimmon", "Persimmon", None, {"num_key_value_heads": 4}),
        ("nemotron", "Nemotron", None, {}),
        ("apertus", "Apertus", None, {}),
        ("arcee", "Arcee", None, {}),
        ("helium", "Helium", None, {}),
        ("glm", "Glm", None, {}),
        ("glm4", "Glm4", None, {}),
        ("glm4_moe", "Glm4Moe", None, {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
        ("deepseek_v2", "DeepseekV2", None, {**_MLA, "first_k_dense_replace": 3, "n_group": 1, "topk_group": 1}),
        ("deepseek_v3", "DeepseekV3", None, {**_MLA, "first_k_dense_replace": 3, "n_group": 1, "topk_group": 1}),
        ("gpt_oss", "GptOss", None, {"sliding_window": 4}),
        ("exaone4", "Exaone4", None, {"sliding_window": 4, "sliding_window_pattern": 2}),
        ("ernie4_5", "Ernie4_5", None, {}),
        ("seed_oss", "SeedOss", None, {}),
        ("hunyuan", "HunYuanDenseV1", None, {}),
        ("bitnet", "BitNet", None, {}),
        ("diffllama", "DiffLlama", None, {}),
        ("lfm2", "Lfm2", None, {"layer_types": ["full_attention", "conv", "full_attention"]}),
        ("falcon_h1", "FalconH1", None, _MAMBA),
        ("bamba", "Bamba", None, {**_MAMBA, "attn_layer_indices": [1]}),
        (
            "jamba",
            "Jamba",
            None,
            {
                "attn_layer_period": 3,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "use_mamba_kernels": False,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
            },
        ),
        (
            "zamba2",
            "Zamba2",
            None,
            {
                "num_hidden_layers": 4,
                "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                "mamba_d_state": 8,
                "n_mamba_heads": 8,
                "mamba_headdim": 8,
                "mamba_ngroups": 1,
                "chunk_size": 8,
                "num_mem_blocks": 1,
                "use_mem_eff_path": False,
            },
        ),
        (
            "nemotron_h",
            "NemotronH",
            None,
            {
                "hybrid_override_pattern": "M*-",
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "n_groups": 1,
                "chunk_size": 8,
            },
        ),
        (
            "minimax",
            "MiniMax",
            None,
            {"layer_types": ["linear_attention", "full_attention", "full_attention"], "block_size": 4},
        ),
        (
            "llama4",
            "Llama4Text",
            "Llama4ForCausalLM",
            {"attention_chunk_size": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        ),
        ("doge", "Doge", None, {}),
        ("vaultgemma", "VaultGemma", None, {"sliding_window": 4}),
        ("afmoe", "Afmoe", None, {"sliding_window": 4, "num_dense_layers": 3}),
        ("recurrent_gemma", "RecurrentGemma", None, {"lru_width": 32, "attention_window_size": 16}),
        ("opt", "OPT", None, {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}),
        ("gpt_neox", "GPTNeoX", None, {}),
        ("gpt2", "GPT2", "GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    )
}
# multimodal wrappers, whose language model has a config of its own: classes, and the family inside
WRAPPERS = {
    "gemma3_wrapper": ("Gemma3Config", "Gemma3ForConditionalGeneration", "gemma3", "siglip_vision_model"),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", "llama", "clip_vision_model"),
    "llava_hybrid": ("LlavaConfig", "LlavaForConditionalGeneration", "qwen3_5", "clip_vision_model"),
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
_IMAGE = {"image_token_id": 90, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
_IMAGE |= {"mm_tokens_per_image": 4, "boi_token_id": 91, "eoi_token_id": 92}


def _config(family: str):
    import transformers

    if family in WRAPPERS:
        name, _, text, vision = WRAPPERS[family]
        parts = {"text_config": _config(text).to_dict(), "vision_config": {"model_type": vision, **_VISION}}
        return getattr(transformers, name)(**parts, **_IMAGE)
    name, _, differs = FAMILIES[family]
    kind = getattr(transformers, name)
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))
    return kind(**{**{key: value for key, value in COMMON.items() if key in known}, **differs})


def family_model(family: str, seed: int = 0):
    """A random model of the family in eval mode, whose weights are large enough for each part to tell."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, {**FAMILIES, **WRAPPERS}[family][1])(_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def examples(shared=4, lengths=(9, 6, 3)):
    """Rows of these lengths after a beginning that they share."""
    beginning = tokens(1, shared, 99)[0].tolist()
    ids = [[*beginning, 3 + seed, *tokens(1, length, seed)[0].tolist()] for seed, length in enumerate(lengths)]
    # two runs of labels, with a row between them that nobody reads
    return [{"input_ids": row, "labels": [IGNORED] * (shared + 1) + row[5:-2] + [IGNORED, row[-1]]} for row in ids]
