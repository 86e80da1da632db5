"""What products in 8 bits do to a model: the error of every linear, the vectors' gradients, and the heads they choose.

    python -m benchmarks.proof.quantized_error --data DIR [--model smollm2] [--examples 16] [--steps 8] [--json FILE]

One batch of a real task goes through the frozen model forward and backward. Of every linear of the decoder layers the
inputs and output gradients are taken, rounded in several ways (`WAYS`, and `BUILT`, which is the engine's on a CPU
without VNNI), and multiplied in float32: the error of y and of dz, relative to what full precision gives. Then the
engine's own int8 products: the cosine of the scales' and the offsets' gradients with those of full precision, and the
overlap of heads chosen by saliency and by a short step 1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import lofit_fast as lf
from benchmarks.speed.timing import machine
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.files import write_json
from lofit_fast.heads import jaccard, select_heads
from lofit_fast.models.load import load_model
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.plain_linear import is_plain_linear
from lofit_fast.tasks import load_task
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.outlier_columns import outlier_columns

TOP = 0.1
# columns of largest magnitude that "mixed" keeps in full, and what "balanced" moves from inputs to weights
_MIXED, _BALANCE = 8, 0.5


def rounded(x: Tensor, top: float) -> Tensor:
    """Rows rounded to integers of at most top in magnitude, times their steps."""
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
    return (x / step).round() * step


def _symmetric(rows: float, weights: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: rounded(x, rows) @ rounded(w, weights).t()


def _balanced(x: Tensor, w: Tensor) -> Tensor:
    share = x.abs().amax(0).clamp_min(1e-5) ** _BALANCE / w.abs().amax(0).clamp_min(1e-5) ** (1 - _BALANCE)
    return rounded(x / share, 127.0) @ rounded(w * share, 64.0).t()


def _mixed(x: Tensor, w: Tensor, kept: Tensor | None = None) -> Tensor:
    if kept is None:
        kept = x.abs().amax(0).topk(min(_MIXED, x.shape[1])).indices
    rest, others = x.index_fill(1, kept, 0), w.index_fill(1, kept, 0)
    return rounded(rest, 127.0) @ rounded(others, 64.0).t() + x[:, kept] @ w[:, kept].t()


def _one_sided(x: Tensor, w: Tensor) -> Tensor:
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-30)
    return ((x / step).round() * step) @ rounded(w, 64.0).t()


# x (T, K), w (N, K) -> x w^T as it would be
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows 8, weights 8 bits": _symmetric(127.0, 127.0),
    "rows 8, weights 7 bits": _symmetric(127.0, 64.0),
    "rows 7, weights 8 bits": _symmetric(63.0, 127.0),
    "rows 8, weights 7 bits, balanced": _balanced,
    "rows 8, weights 7 bits, the batch's 8 largest columns in full": _mixed,
    "rows 8 with a zero point, weights 7 bits": _one_sided,
}
BUILT = "rows 8, weights 7 bits, the engine's columns in full for y"


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CLUTRR splits")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--examples", type=int, default=16, help="of the batch whose errors are measured")
    parser.add_argument("--steps", type=int, default=8, help="of the short step 1")
    parser.add_argument("--json", type=Path, default=Path("docs/results/quantized_error.json"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32")
    model.requires_grad_(False)
    examples = load_task("clutrr", options.data, tokenizer, train_size=4 * options.examples, seed=0, progress=False)
    rows = [encode(tokenizer, row, None) for row in examples.train]
    collator = CompletionCollator(pad_token_id(tokenizer))
    batches = [collator(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    first = collator(rows[: options.examples])
    found = {
        "kind": "exact numbers, no clock",
        "model": options.model,
        "examples": options.examples,
        "machine": machine(),
        "linears": linear_errors(model, first),
        "gradient_cosine": gradient_cosines(model, first),
        "heads": head_overlaps(model, batches[: options.steps]),
    }
    write_json(options.json, found)
    _show(found)


def linear_errors(model: nn.Module, batch: dict) -> dict[str, dict[str, dict[str, float]]]:
    """way -> "y" | "dz" -> the median and largest relative error over linears, and the largest linear's name."""
    named = {
        f"{number}.{name}": module
        for number, layer in enumerate(decoder_layers(model))
        for name, module in layer.named_modules()
        if is_plain_linear(module)
    }
    columns = outlier_columns(model, named.values(), "int8")
    errors: dict[str, dict[str, dict[str, float]]] = {way: {"y": {}, "dz": {}} for way in (*WAYS, BUILT)}

    def note(side: str, name: str, x: Tensor, weight: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        # rows of zeros are padding or below every label
        x = x[x.abs().amax(1) > 0]
        exact = x @ weight.t()
        kept = columns[named[name]].kept if side == "y" else torch.tensor([], dtype=torch.int64)
        for way, product in {**WAYS, BUILT: partial(_mixed, kept=kept)}.items():
            errors[way][side][name] = ((product(x, weight) - exact).norm() / exact.norm()).item()

    with _listening(named, note), selecting_rows(model):
        # the embeddings ask for a gradient, so that every linear gets one
        model.get_input_embeddings().weight.requires_grad_(True)
        model(**batch, use_cache=False).loss.backward()
        model.requires_grad_(False)
        model.get_input_embeddings().weight.grad = None
    return {way: {side: _summary(of) for side, of in sides.items()} for way, sides in errors.items()}


@contextmanager
def _listening(named: dict[str, nn.Module], note: Callable[[str, str, Tensor, Tensor], None]) -> Iterator[None]:
    hooks = []
    for name, module in named.items():

        def forward(module, args, output, name=name):
            note("y", name, args[0], module.weight)
            output.register_hook(lambda grad: note("dz", name, grad, module.weight.t()))

        hooks.append(module.register_forward_hook(forward))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _summary(errors: dict[str, float]) -> dict[str, object]:
    worst = max(errors, key=errors.get)
    kinds = {name.rpartition(".")[2] for name in errors}
    by_kind = {
        kind: statistics.median(e for name, e in errors.items() if name.endswith(kind)) for kind in sorted(kinds)
    }
    return {"median": statistics.median(errors.values()), "largest": errors[worst], "where": worst, "by_kind": by_kind}


def gradient_cosines(model: nn.Module, batch: dict) -> dict[str, dict[str, float]]:
    """component -> the cosine of all vectors' gradients together, and the least of any layer's."""
    found = {}
    for component in ("scale", "offset"):
        handle = lf.patch(model, lf.LofitConfig(**{component: "all"}))
        try:
            full = _gradients(handle, [batch])
            with prepared(model, Engine(frozen_products="int8")):
                quantized = _gradients(handle, [batch])
        finally:
            handle.unpatch()
        each = [cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(full, quantized, strict=True)]
        together = [torch.cat([g.flatten() for g in of]) for of in (full, quantized)]
        found[component] = {"all": cosine_similarity(*together, dim=0).item(), "least of a layer": min(each)}
    return found


def head_overlaps(model: nn.Module, batches: Sequence[dict]) -> dict[str, float]:
    """Jaccard index of the top heads, full precision against int8, and of two batch orders in full beside it."""
    chosen: dict[str, dict[str, list]] = {"saliency": {}, "short step 1": {}}
    runs = {"full": ("full", batches), "int8": ("int8", batches), "order": ("full", batches[::-1])}
    for name, (precision, order) in runs.items():
        handle = lf.patch(model, lf.LofitConfig(scale="all"))
        try:
            with prepared(model, Engine(frozen_products=precision)):
                saliency = _gradients(handle, order)
                _train(handle, order)
            norms = torch.stack([g.norm(dim=1) for g in saliency])
            chosen["saliency"][name] = select_heads(norms, TOP)
            chosen["short step 1"][name] = select_heads(lf.head_scores(handle), TOP)
        finally:
            handle.unpatch()
    return {
        f"{way}, {label}": jaccard(heads["full"], heads[other])
        for way, heads in chosen.items()
        for label, other in (("int8 against full", "int8"), ("control: another order of batches", "order"))
    }


def _gradients(handle: lf.LofitHandle, batches: Sequence[dict]) -> list[Tensor]:
    parameters, total = list(handle.parameters()), None
    for batch in batches:
        with selecting_rows(handle.model):
            loss = handle.model(**batch, use_cache=False).loss
        grads = torch.autograd.grad(loss, parameters)
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    return list(total)


def _train(handle: lf.LofitHandle, batches: Sequence[dict]) -> None:
    optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-3, weight_decay=0.0)
    for batch in batches:
        for parameter, gradient in zip(handle.parameters(), _gradients(handle, [batch]), strict=True):
            parameter.grad = gradient + 5e-4 * parameter.detach().sign()
        optimizer.step()


def _show(found: dict) -> None:
    for way, sides in found["linears"].items():
        numbers = ", ".join(f"{side} {of['median']:.2%} (largest {of['largest']:.1%})" for side, of in sides.items())
        print(f"{way}: {numbers}")
    print("gradient cosine:", found["gradient_cosine"])
    print("heads:", found["heads"])


if __name__ == "__main__":
    main()
