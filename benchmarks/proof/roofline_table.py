"""Ours beside a compiled hook by the roofline: ten shapes, five settings, every device.

    python -m benchmarks.proof.roofline_table [--markdown docs/kernels/roofline.md]

Predictions, by arithmetic alone: no clock is involved, and no GPU needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lofit_fast.files import write_text
from lofit_kernels.dispatch import is_many, plan
from lofit_kernels.roofline import DEVICES, PATHS, Device, Shape, predict
from lofit_kernels.shapes import SHAPES

# name -> share of the heads with a scale, and with an offset
SETTINGS: dict[str, tuple[float, float]] = {
    "step 1": (1, 0),
    "step 2": (0, 0.1),
    "both, all heads": (1, 1),
    "both, few heads": (0.1, 0.1),
    "few scales": (0.1, 0),
}
# model, tokens
TEN: tuple[tuple[str, int], ...] = (
    ("Llama-3.2-1B", 512),
    ("Llama-3.2-1B", 4096),
    ("Llama-3-8B", 512),
    ("Llama-3-8B", 4096),
    ("Gemma-2-9B", 512),
    ("Gemma-2-9B", 4096),
    ("Llama-2-13B", 512),
    ("Llama-2-13B", 4096),
    ("Llama-3-70B", 1024),
    ("Llama-3-70B", 4096),
)
EVERY_T = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DTYPE = torch.bfloat16

_PAGE = """\
# Ours and a compiled hook, predicted

Evidence: prediction by a roofline; nothing here was timed. `python -m benchmarks.proof.roofline_table --markdown
docs/kernels/roofline.md` writes this page, and a test holds it to what the command writes.

Time of one output projection, forward and backward, to that of its two frozen products: *ours / compiled hook*, in
bfloat16. *Ours* is the path that `dispatch.py` chooses on a GPU where nothing was measured; it loses no small scale or
offset that its CPU default keeps. *Compiled hook* is the same function under `torch.compile`, which rounds small scales
and offsets away. Few heads are a tenth, as in step 2. `kernels/lofit_kernels/roofline.py` has the steps of every path,
the figures of the devices with their sources, and what is assumed: 80 % of the peak for products, 90 % of the bandwidth
for sweeps, at least 3 microseconds a kernel. The host's time is not in it. The compiled hook is taken to compute dz in
a kernel of its own after the sums over tokens. A compiler that made one sweep of both would move what ours moves there.

{tables}

## Where ours is not ahead

Of all models in `shapes.py` at 128 to 16384 tokens, {total} cells, ours is predicted to take longer in these {count}:

{losses}

Step 2 reads the chosen heads' columns of W twice, whatever the number of tokens. Below a few hundred tokens the hook's
sweep over z is smaller than that. From {first} tokens on, {later} cells remain.
"""


class Cell(NamedTuple):
    """A prediction of ours and of the compiled hook's: time to the floor's."""

    device: str
    model: str
    T: int
    setting: str
    ours: float
    hook: float

    @property
    def behind(self) -> bool:
        """Whether ours takes longer, by more than rounding."""
        return self.ours > self.hook * (1 + 1e-9)


def cell(device: Device, model: str, T: int, setting: str) -> Cell:
    """One cell of the table. model: a name in SHAPES; setting: one in SETTINGS."""
    layer = SHAPES[model]
    n_scale, n_offset = (max(1, round(share * layer.H)) if share else 0 for share in SETTINGS[setting])
    shape = Shape(T, layer.N, layer.H, layer.D, n_scale, n_offset, DTYPE.itemsize, layer.layers)
    case = {"has_scale": n_scale > 0, "many_heads": is_many(n_scale, layer.H), "has_offset": n_offset > 0}
    chosen = plan(**case, dtype=DTYPE, device_type="cuda", backend="triton")
    ours, hook = (predict(path, shape, device) for path in ((chosen.forward, chosen.backward), PATHS["compiled hook"]))
    return Cell(device.name, model, T, setting, ours.ratio, hook.ratio)


def table(device: Device) -> list[list[Cell]]:
    """A row for each of TEN, a cell for each of SETTINGS."""
    return [[cell(device, model, T, setting) for setting in SETTINGS] for model, T in TEN]


def every_cell() -> Iterator[Cell]:
    """All models, numbers of tokens, settings and devices."""
    models = [model for model in SHAPES if model != "toy"]
    for device in DEVICES.values():
        for model in models:
            for T in EVERY_T:
                yield from (cell(device, model, T, setting) for setting in SETTINGS)


def _tables() -> Iterator[str]:
    for device in DEVICES.values():
        head = ["model", "tokens", *SETTINGS]
        yield f"## {device.name}\n"
        yield "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|"
        for row in table(device):
            shown = [f"{c.ours:.3f} / {c.hook:.3f}" + (" behind" if c.behind else "") for c in row]
            yield "| " + " | ".join((row[0].model, str(row[0].T), *shown)) + " |"
        yield ""


def _losses(behind: Sequence[Cell]) -> Iterator[str]:
    yield "| setting | tokens | model | devices: ours / hook |"
    yield "|---|---|---|---|"
    groups: dict[tuple[str, int, str], list[Cell]] = {}
    for c in behind:
        groups.setdefault((c.setting, c.T, c.model), []).append(c)
    for (setting, T, model), found in sorted(groups.items()):
        devices = ", ".join(f"{c.device} {c.ours:.3f} / {c.hook:.3f}" for c in found)
        yield f"| {setting} | {T} | {model} | {devices} |"


def markdown() -> str:
    """The page."""
    cells = list(every_cell())
    behind = [c for c in cells if c.behind]
    first = 512
    later = sum(first <= c.T for c in behind)
    found = {"total": len(cells), "count": len(behind), "first": first, "later": later}
    return _PAGE.format(tables="\n".join(_tables()).strip(), losses="\n".join(_losses(behind)), **found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or write it; the exit status is 1 when ours is behind anywhere in the ten shapes."""
    parser = argparse.ArgumentParser(prog="benchmarks.proof.roofline_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page there instead of printing it")
    chosen = parser.parse_args(arguments)
    if chosen.markdown:
        try:
            write_text(chosen.markdown, markdown())
        except OSError as error:
            parser.error(str(error))
    else:
        print(markdown())
    return int(any(c.behind for device in DEVICES.values() for row in table(device) for c in row))


if __name__ == "__main__":
    raise SystemExit(main())
