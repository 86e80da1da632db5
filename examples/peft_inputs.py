"""What the two examples with PEFT train: a model, and one batch of family stories for it."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.models.load import load_model
from lofit_fast.tasks.kinship import kinship


def model_and_batch(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """name: "tiny" for a random model of three layers and random tokens, or what `lofit-fast train --model` takes."""
    if name == "tiny":
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, pad_token_id=0, **sizes))
        tokens = torch.randint(3, 97, (4, 16))
        return model, {"input_ids": tokens, "labels": tokens}
    model, tokenizer = load_model(name, dtype="float32", device="cpu")
    rows = [encode(tokenizer, example, None) for example in kinship(8, 1, 0).train]
    return model, dict(CompletionCollator(pad_token_id(tokenizer))(rows))


def train(model: nn.Module, batch: dict[str, Tensor], steps: int, lr: float) -> list[float]:
    """A bare loop over one batch and everything that is trainable. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
