"""A base that takes no time: a random Llama of three layers in a folder, its tokenizer, and a little data for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import lofit_fast as lf

LAYERS, HEADS = 3, 4
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
VOCABULARY = (*_SPECIAL, *(chr(code) for code in range(32, 125) if chr(code) != "`"))
EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdefgh", "mnopqrst", strict=True)]
HELD_OUT = [{"prompt": "a+t=", "completion": "ta"}, {"prompt": "b+s=", "completion": "sb"}]
PREFERENCES = [
    {"prompt": f"Q: {name}? A:", "chosen": f" {name}.", "rejected": [f" {wrong}!" for wrong in "xyz"[: 1 + at % 3]]}
    for at, name in enumerate(("ab", "cde", "f", "ghij"))
]
RECIPE = lf.Recipe(top=3, select_epochs=2, tune_epochs=2, batch_size=4)
# vectors that act in the last layer alone leave a prefix to be kept
LAST_HEADS = [(2, 1), (2, 3)]


def tiny_base(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = LAYERS):
    """The model, in eval mode: 4 heads of 16, hidden 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


def character_tokenizer():
    """A token per character, and the special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_base(folder: Path) -> Path:
    """Model, tokenizer and data as files: what a command is given. Returns the folder of the model."""
    base = folder / "base"
    if not (base / "done").is_file():
        tiny_base().save_pretrained(base)
        character_tokenizer().save_pretrained(base)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
        (base / "done").write_text("")
    return base


def filled_vectors(handle: lf.LofitHandle, seed: int = 7, std: float = 0.3) -> lf.LofitHandle:
    """The handle, with vectors large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return handle


def token_batch(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    """(batch, length) token ids, none of them special."""
    return torch.randint(len(_SPECIAL), len(VOCABULARY), (batch, length), generator=torch.Generator().manual_seed(seed))
