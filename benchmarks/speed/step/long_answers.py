"""Peak memory of a step with a label on every token of one row, at Gemma's vocabulary: all logits against chunks.

`python -m benchmarks.speed.step.long_answers` runs each length in a process of its own and prints a table. The model
is small but for its vocabulary, so that the logits are the memory. Where all logits would not fit, their row is left
out: see `--plain`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

VOCABULARY, HIDDEN = 262_144, 64
# labelled tokens of one row; all logits of the last take more than most machines have
LENGTHS, PLAIN = (1024, 2048, 8192), (1024, 2048)


def long_model():
    """A random Llama of one layer, 1 head and the vocabulary, with tied embeddings: 67 MB in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=LENGTHS[-1],
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def measured(length: int, chunked: bool) -> dict[str, float]:
    """Peak bytes of one step above the model, its loss and the norm of its gradient, as plain data."""
    import lofit_fast as lf
    from lofit_fast.models.head_trial import chunked_losses, frozen_head
    from lofit_fast.training.cost import peak_memory

    model = long_model()
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    parameters = list(handle.parameters())
    # what a first step maps (libraries, thread pools, weights) belongs to no way
    torch.autograd.grad(model(input_ids=ids[:, :8], labels=ids[:, :8], use_cache=False).loss, parameters)
    head = frozen_head(model) if chunked else None
    with peak_memory("cpu") as memory, chunked_losses(model, head):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return {"peak_bytes": memory.peak_bytes, "loss": loss.item(), "gradient_norm": norm.item()}


def in_process(length: int, chunked: bool) -> dict[str, float]:
    """`measured` in a process of its own, which gives its memory back."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", str(length)]
    ran = subprocess.run([*command, *["--chunked"] * chunked], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def table(plain: tuple[int, ...]) -> list[dict[str, object]]:
    """A row per length: bytes of one copy of all logits in float32, peaks of both ways, losses."""
    rows = []
    for length in LENGTHS:
        ways = {"all": in_process(length, False)} if length in plain else {}
        ways["chunks"] = in_process(length, True)
        rows.append({"labelled": length, "logits_bytes": length * VOCABULARY * 4, **ways})
    return rows


def main() -> None:
    """Print the table, or one process's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, help="measure this many labelled tokens in this process")
    parser.add_argument("--chunked", action="store_true", help="with --one: in chunks")
    parser.add_argument("--plain", type=int, nargs="*", default=PLAIN, help="lengths to measure with all logits")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measured(given.one, given.chunked)))
        return
    for row in table(tuple(given.plain)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
