"""How much of a small scale or offset reaches y in 16 bits, per path: gains, a table and a plot.

    python -m benchmarks.proof.dead_zone [--output docs/results]

The gain is the observed change of y projected onto the exact one, over all elements: 1 when the vector works, 0 when
rounding swallows it. Rounding y itself adds noise that is many times the change of one element but has no bias, so the
gain over n elements has a standard error, estimated from the sample. Evidence: bfloat16 arithmetic on this CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.speed.timing import machine
from lofit_fast.files import write_json
from lofit_kernels import head_affine_linear, reference

T, H, D, N = 512, 4, 64, 512
MAGNITUDES = tuple(m * 10.0**e for e in (-4, -3, -2) for m in (1, 2, 5)) + (1e-1,)
Run = Callable[..., Tensor]


class Gain(NamedTuple):
    """The gain, its standard error, and how large the noise beside it is, as a share of the change."""

    value: float
    error: float
    noise: float


@dataclass(frozen=True)
class Way:
    """A way to compute one projection with a vector on every head."""

    component: str
    run: Run


def inputs(dtype: torch.dtype, bias: bool) -> dict[str, Tensor | None]:
    """z (T, K), weight (N, K) and bias (N,) or None, of order 1 in y."""
    return {
        "z": torch.randn(T, H * D).to(dtype),
        "weight": (torch.randn(N, H * D) / (H * D) ** 0.5).to(dtype),
        "bias": torch.randn(N).to(dtype) if bias else None,
    }


def rows(magnitude: float, heads: int = H) -> Tensor:
    """(heads, D), all of one magnitude, signs at random."""
    return magnitude * (2.0 * torch.randint(0, 2, (heads, D)) - 1)


def gain(run: Run, given: dict, **vectors: Tensor) -> Gain:
    """The gain of the change that `vectors` make in run(**given, **vectors)."""
    zero = {k: torch.zeros_like(v) for k, v in vectors.items()}
    observed = run(**given, **vectors).double() - run(**given, **zero).double()
    base = {k: None if v is None else v.double() for k, v in given.items()}
    exact = {**base, **{k: v.double() for k, v in vectors.items()}}
    heads = {f"{name}_heads": torch.arange(v.shape[0]) for name, v in vectors.items()}
    change = reference.affine_linear(**exact, **heads) - reference.affine_linear(**base)
    size = change.square().sum()
    value = (observed * change).sum() / size
    left = observed - value * change
    return Gain(value.item(), ((left * change).norm() / size).item(), (left.norm() / size.sqrt()).item())


def hook_scale(z: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """An eager hook with float32 parameters: multiplied in float32, cast back to z's dtype."""
    return linear((z.unflatten(-1, scale.shape) * (1 + scale)).flatten(-2).to(z.dtype), weight, bias)


def hook_offset(z: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """An eager hook with float32 parameters: added in float32, cast back to z's dtype."""
    return linear((z.unflatten(-1, offset.shape) + offset).flatten(-2).to(z.dtype), weight, bias)


def folded_weight(z: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """W diag(1 + a) in the model's dtype: what merging into 16-bit weights computes."""
    return linear(z, (weight * (1 + scale.flatten())).to(weight.dtype), bias)


def two_products(z: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """z W^T + (a z) W^T as two products that are rounded to 16 bits before they are added."""
    part = (z.unflatten(-1, scale.shape) * scale).flatten(-2).to(z.dtype)
    return linear(z, weight, bias) + linear(part, weight)


def stochastic(z: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """(1 + a) z rounded up or down at random, unbiased; bfloat16 only."""
    wide = (z.unflatten(-1, scale.shape) * (1 + scale)).flatten(-2).float()
    bits = wide.view(torch.int32)
    rounded = (bits + torch.randint_like(bits, 0, 1 << 16)) & ~0xFFFF
    return linear(rounded.view(torch.float32).to(z.dtype), weight, bias)


def _form(form: str) -> Run:
    return lambda **given: head_affine_linear(**given, form=form)


PATHS = {
    "delta (one accumulator)": Way("scale", _form("delta")),
    "dither": Way("scale", _form("dither")),
    "pass, or fused prologue": Way("scale", _form("pass")),
    "eager hook, scale": Way("scale", hook_scale),
    "folded weight": Way("scale", folded_weight),
    "two products, added in bf16": Way("scale", two_products),
    "pass, stochastic rounding": Way("scale", stochastic),
    "fold (offset)": Way("offset", _form("auto")),
    "dither (offset)": Way("offset", _form("dither")),
    "eager hook, offset": Way("offset", hook_offset),
}


def gain_by_magnitude(dtype: torch.dtype = torch.bfloat16) -> dict[str, list[dict[str, float]]]:
    """Per path, a row of magnitude, gain, standard error and noise."""
    torch.manual_seed(0)
    given = inputs(dtype, bias=False)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PATHS}
    for magnitude in MAGNITUDES:
        vectors = rows(magnitude)
        for name, path in PATHS.items():
            seen = gain(path.run, given, **{path.component: vectors})
            found[name].append({"magnitude": magnitude, **seen._asdict()})
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: the gain per path and magnitude."""
    shown = [m for m in MAGNITUDES if f"{m:.0e}"[0] in "15"]
    lines = ["| path | " + " | ".join(f"{m:g}" for m in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, measured in found.items():
        by_magnitude = {row["magnitude"]: row["value"] for row in measured}
        lines.append(f"| {name} | " + " | ".join(f"{by_magnitude[m]:.2f}" for m in shown) + " |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Gain over magnitude and noise over magnitude, a line per path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    gains, noises = figure.subplots(1, 2)
    for number, (name, measured) in enumerate(found.items()):
        # some lie on each other
        width = 4.5 - 0.5 * number
        style = "--" if PATHS[name].component == "offset" else "-"
        magnitudes = [row["magnitude"] for row in measured]
        errors = [2 * row["error"] for row in measured]
        gains.errorbar(magnitudes, [row["value"] for row in measured], errors, fmt=style, lw=width, label=name)
        noises.plot(magnitudes, [row["noise"] for row in measured], style, lw=width, label=name)
    for axis, label in ((gains, "gain of the change in y"), (noises, "noise beside it / exact change")):
        axis.axvline(2.0**-9, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="|a| or |v| (z of order 1)", ylabel=label)
    noises.set(yscale="log")
    gains.annotate("|a| = 2^-9", (2.0**-9, 0.02), xytext=(4, 0), textcoords="offset points", color="grey")
    noises.legend(frameon=False, fontsize=8)
    figure.suptitle("What reaches y in bfloat16 (bars: two standard errors)")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print the table, write dead_zone.json and dead_zone.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    found = gain_by_magnitude()
    write_json(options.output / "dead_zone.json", {"machine": machine(), "paths": found})
    plot(found, options.output / "dead_zone.png")
    print(table(found))


if __name__ == "__main__":
    main()
