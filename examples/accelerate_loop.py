"""A loop with accelerate: its saved states hold the vectors once AdapterCheckpoints follows it."""

from itertools import chain, islice, repeat
from pathlib import Path

import torch
import typer
from accelerate import Accelerator

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, model_and_stories, tell
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.training import CompletionCollator


def train_accelerated(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets on every head, from output/state where that exists. Returns the losses of this call's steps."""
    rows = [encode(tokenizer, story, None) for story in stories]
    collate = CompletionCollator(pad_token_id(tokenizer))
    batches = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    accelerator = Accelerator()
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=3e-3, weight_decay=0.0)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    lf.AdapterCheckpoints(handle).follow(accelerator)
    if (output / "state").exists():
        accelerator.load_state(output / "state")
    model.train()
    losses = []
    for batch in islice(chain.from_iterable(repeat(batches)), steps):
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    accelerator.save_state(output / "state")
    handle.save(output / "adapter")
    return losses


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/accelerate")) -> None:
    """Train in a loop with accelerate; run it again to go on."""
    tell(train_accelerated(*model_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
