"""A loop of one's own under autocast: vectors and optimizer stay float32, the model computes in bfloat16."""

from itertools import chain, islice, repeat
from pathlib import Path

import torch
import typer

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, model_and_stories, tell
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.training import CompletionCollator


def train_autocast(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets on every head. Returns the losses; the adapter is in output/adapter."""
    rows = [encode(tokenizer, story, None) for story in stories]
    collate = CompletionCollator(pad_token_id(tokenizer))
    batches = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    losses = []
    for batch in islice(chain.from_iterable(repeat(batches)), steps):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    handle.save(output / "adapter")
    return losses


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/autocast")) -> None:
    """Train in a plain loop under autocast."""
    tell(train_autocast(*model_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
