"""Two finished runs side by side, of one process and of several."""

import json

import torch
from safetensors.torch import load_file

import lofit_fast as lf
from lofit_fast.models.load import load_model

TOLERANCE = 1e-5


def of_run(folder):
    """(heads, losses of every step by stage, vectors) of a finished run."""
    heads = json.loads((folder / "heads.json").read_text())["heads"]
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    losses = [(row["stage"], row["step_losses"]) for row in history]
    return heads, losses, load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(got, expected):
    """Step-1 losses, chosen heads, step-2 losses and vectors."""
    (heads, losses, vectors), (its_heads, its_losses, its_vectors) = of_run(got), of_run(expected)
    assert heads == its_heads and [stage for stage, _ in losses] == [stage for stage, _ in its_losses]
    for (stage, steps), (_, its_steps) in zip(losses, its_losses, strict=True):
        # of a history, which has five decimals
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(its_steps), rtol=0, atol=1.1e-5, msg=stage)
    assert vectors.keys() == its_vectors.keys()
    for name, vector in vectors.items():
        torch.testing.assert_close(vector, its_vectors[name], rtol=0, atol=TOLERANCE)


def assert_same_logits(model, got, expected):
    """Of the two adapters, each loaded in this one process."""
    ids = torch.arange(12)[None] + 3
    logits = []
    for folder in (got, expected):
        base, _ = load_model(model, dtype="float32", device="cpu")
        lf.load(base, folder / "adapter")
        with torch.no_grad():
            logits.append(base(ids).logits)
    # of the largest: float32 numbers about SmolLM2's, 34, are 4e-6 apart
    largest = max(1.0, logits[1].abs().max().item())
    torch.testing.assert_close(*logits, rtol=0, atol=TOLERANCE * largest)
