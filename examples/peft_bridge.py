"""LoFiT by PEFT's own calls: get_peft_model, save_pretrained, from_pretrained, disable_adapter, merge_and_unload."""

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel, get_peft_model

from examples.peft_inputs import model_and_batch, train
from lofit_fast.peft import LofitPeftConfig


def main(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny, or as for `lofit-fast train`.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Adapter folder. Default: a temporary one.")
    ] = None,
) -> list[float]:
    """Train offsets on all heads of a PeftModel, and take the adapter through its life. Returns the losses."""
    base, batch = model_and_batch(model)
    # heads: "all", or those that step 1 has chosen, [(layer, head), ...]
    adapted = get_peft_model(base, LofitPeftConfig(offset="all", task_type="CAUSAL_LM"))
    adapted.print_trainable_parameters()
    losses = train(adapted, batch, steps, lr=3e-3)
    print(f"loss: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")

    with tempfile.TemporaryDirectory() as passing, torch.no_grad():
        folder = output or Path(passing)
        adapted.save_pretrained(folder)
        expected = adapted(**batch, use_cache=False).loss.item()
        with adapted.disable_adapter():
            print(f"without the adapter: {adapted(**batch, use_cache=False).loss.item():.3f}")
        again = PeftModel.from_pretrained(adapted.unload(), folder).eval()
        assert again(**batch, use_cache=False).loss.item() == expected
        # a plain model, which saves and reloads with its new biases
        merged = again.merge_and_unload()
        print(f"merged: {merged(**batch, use_cache=False).loss.item():.3f}, loaded again: {expected:.3f}")
    return losses


if __name__ == "__main__":
    typer.run(main)
