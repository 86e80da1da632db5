"""Tiny randomly initialised models, one per family, and token batches for them."""

import torch

VOCAB, LAYERS, HEADS, HEAD_DIM, HIDDEN = 97, 3, 4, 16, 32

# config class, model class, what differs from the common shape
_MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 8}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": 8}),
}
FAMILIES = tuple(_MODELS)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random model of the family in eval mode: 3 layers, 4 heads (2 of keys and values), head_dim 16, hidden 32."""
    import transformers

    config_name, model_name, differs = _MODELS[family]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, config_name)(**{**common, **differs, **changes})
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(config).to(dtype).eval()


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    """(batch, length) token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def spread(model):
    """The model with larger weights, so that its logits lie far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0 if "embed" not in name else 2.0)
    return model
