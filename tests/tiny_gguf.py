"""GGUF files of tiny Llamas, written here from their tensors, as llama.cpp's converter lays them out."""

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor, nn

from tests.tiny_tokenizers import CHARACTERS, SPECIAL

# module in transformers -> its name in a GGUF file
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a Llama's tensor."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    number, inside = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[inside]}.{kind}"


def interleaved(tensor: Tensor, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp rotates them: (0, D/2, 1, D/2 + 1, ...) of each head."""
    array = tensor.detach().float().numpy()
    size = array.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return np.ascontiguousarray(array[order])


def tensors_of(model: nn.Module) -> dict[str, np.ndarray]:
    """A Llama's tensors as a GGUF file has them."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        key = gguf_name(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(key.split(".")[-2])
        found[key] = interleaved(tensor, heads) if heads else tensor.detach().float().numpy().copy()
    return found


def write_tiny_gguf(
    path: Path,
    model: nn.Module,
    more: dict | None = None,
    entries: dict | None = None,
    tensors: dict | None = None,
    raw: dict | None = None,
    architecture: str = "llama",
) -> Path:
    """A GGUF file of a tiny Llama.

    more, entries: tensors and metadata besides. tensors: in place of the model's. raw: (array, type) in place of some.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    for name, value in (entries or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    # byte-level tokenizers spell a space so; and what two are merged to has a place
    spelled = {" ": "\u0120", "|": "he"}
    tokens = [*SPECIAL, *(spelled.get(c, c) for c in CHARACTERS)]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(CHARACTERS))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, array in ((tensors_of(model) if tensors is None else tensors) | (more or {})).items():
        array, kind = (raw or {}).get(name, (array, None))
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
