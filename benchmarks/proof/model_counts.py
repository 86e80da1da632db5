"""What a whole model launches in one step with LoFiT on every layer: beyond the base model, ours and a hook's.

    python -m benchmarks.proof.model_counts [--layers 16] [--tokens 512] [--markdown docs/counts.md]

Exact, no GPU needed. The model is a small Llama in bfloat16, since neither its sizes nor its weights matter for how
many launches a forward and backward pass make. Ours is patched as `lofit_fast.patch` does it, and takes the paths that
it takes on a GPU; `launch.recording` notes its kernels without running them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lofit_fast as lf
from benchmarks.proof.counts import ARCH
from benchmarks.proof.traffic import launches_of
from benchmarks.speed.op.operators import SETTINGS, few_heads
from lofit_fast.files import write_text
from lofit_kernels import dispatch
from lofit_kernels.gpu.launch import recording

H, D = 10, 16
START, END = "<!-- model counts -->\n", "<!-- end of model counts -->"
_HEADER = ("setting", "base model", "hook adds", "of them per layer", "ours adds", "of them per layer")


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += launches_of(operator)
        return operator(*args, **(kwargs or {}))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within it Triton is the default backend on a CPU, too: for `recording`, under which nothing runs."""
    with patch.object(dispatch, "default_backends", lambda *_: ("triton", "aten")):
        dispatch.forget_plans()
        try:
            yield
        finally:
            dispatch.forget_plans()


def llama(layers: int) -> nn.Module:
    """A Llama without dropout, frozen, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": H * D, "num_attention_heads": H, "head_dim": D, "intermediate_size": 64, "vocab_size": 32}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).bfloat16()
    return model.requires_grad_(False)


def launches(model: nn.Module, tokens: int) -> int:
    """Of one forward and backward pass, with a gradient all the way down to the embeddings."""
    embedded = torch.zeros(1, tokens, H * D, dtype=torch.bfloat16, requires_grad=True)
    counter = _Launches()
    with recording(ARCH) as recorded, counter, torch.autograd.set_multithreading_enabled(False):
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    return counter.count + len(recorded.launches)


def _heads(which: str | None, layers: int) -> list[tuple[int, int]] | str | None:
    return [(layer, head) for layer in range(layers) for head in few_heads(H)] if which == "few" else which


def of_ours(setting: str, layers: int, tokens: int) -> int:
    """The launches of a patched model."""
    scale, offset = (_heads(which, layers) for which in SETTINGS[setting])
    model = llama(layers)
    with as_on_gpu():
        lf.patch(model, lf.LofitConfig(scale=scale, offset=offset))
        return launches(model, tokens)


def of_hook(setting: str, layers: int, tokens: int) -> int:
    """The launches of a model whose output projections have a forward pre-hook each, as `operators.hook` computes."""
    model = llama(layers)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(_hook(*SETTINGS[setting]))
    return launches(model, tokens)


def _hook(scaled: str | None, shifted: str | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    chosen = {"all": list(range(H)), "few": few_heads(H)}
    heads = [None if which is None else torch.tensor(chosen[which]) for which in (scaled, shifted)]
    a, v = (None if of is None else torch.zeros(len(of), D, requires_grad=True) for of in heads)

    def dense(rows: Tensor, of: Tensor) -> Tensor:
        return rows if len(of) == H else rows.new_zeros(H, D).index_copy(0, of, rows)

    def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (z,) = args
        x = z.unflatten(-1, (H, D))
        x = x if a is None else x * (1 + dense(a, heads[0]))
        x = x if v is None else x + dense(v, heads[1])
        return (x.flatten(-2).to(z.dtype),)

    return edit


def rows(layers: int, tokens: int) -> list[tuple[str, int, int, float, int, float]]:
    """(setting, the base model's launches, what the hook adds, per layer, what ours adds, per layer)."""
    base = launches(llama(layers), tokens)
    found = []
    for setting in SETTINGS:
        hook, ours = of_hook(setting, layers, tokens) - base, of_ours(setting, layers, tokens) - base
        found.append((setting, base, hook, hook / layers, ours, ours / layers))
    return found


def markdown(found: Sequence[tuple], layers: int, tokens: int) -> str:
    """The rows as a Markdown table under a line that says what they are of."""
    lines = [f"{layers} layers, {tokens} tokens:", "", "| " + " | ".join(_HEADER) + " |", "|---" * len(_HEADER) + "|"]
    for setting, base, hook, of_hooks, ours, of_ours_ in found:
        lines.append(f"| {setting} | {base} | {hook} | {of_hooks:.1f} | {ours} | {of_ours_:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.proof.model_counts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    chosen = parser.parse_args(arguments)
    text = markdown(rows(chosen.layers, chosen.tokens), chosen.layers, chosen.tokens)
    print(text)
    if chosen.markdown:
        page = chosen.markdown.read_text()
        write_text(chosen.markdown, page.split(START)[0] + START + text + END + page.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
