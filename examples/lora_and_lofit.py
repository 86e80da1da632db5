"""LoRA and LoFiT trained together: PEFT first, then `patch`, then PEFT's adapter made trainable again."""

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model

import lofit_fast as lf
from examples.peft_inputs import model_and_batch, train


def main(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny, or as for `lofit-fast train`.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of both. Default: a temporary one.")
    ] = None,
) -> list[float]:
    """Train both, save each in a folder of its own, load both, and merge LoRA away. Returns the losses."""
    base, batch = model_and_batch(model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    # freezes all but its own vectors, with a warning that the next line answers
    handle = lf.patch(adapted, lf.LofitConfig(offset="all"))
    adapted.set_adapter("default")
    losses = train(adapted, batch, steps, lr=3e-3)
    print(f"loss: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")

    with tempfile.TemporaryDirectory() as passing, torch.no_grad():
        folder = output or Path(passing)
        adapted.save_pretrained(folder / "lora")
        handle.save(folder / "lofit")
        expected = adapted(**batch, use_cache=False).loss.item()
        # neither of the two is on in here
        with adapted.disable_adapter():
            print(f"the base: {adapted(**batch, use_cache=False).loss.item():.3f}")
        handle.unpatch()
        again = PeftModel.from_pretrained(adapted.unload(), folder / "lora").eval()
        handle = lf.load(again, folder / "lofit")
        assert again(**batch, use_cache=False).loss.item() == expected
        # LoRA goes into the weights, LoFiT stays on; then LoFiT goes into the biases
        plain = again.merge_and_unload()
        handle.merge()
        print(f"both merged: {plain(**batch, use_cache=False).loss.item():.3f}, loaded again: {expected:.3f}")
    return losses


if __name__ == "__main__":
    typer.run(main)
