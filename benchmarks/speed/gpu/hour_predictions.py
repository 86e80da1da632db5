"""What the roofline predicts for what was timed: a projection, and what an adapter adds to a whole step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.speed.gpu import gpu_report
from benchmarks.speed.op.operators import SETTINGS, few_heads
from lofit_kernels import roofline
from lofit_kernels.dispatch import is_many, plan
from lofit_kernels.roofline import PATHS, Device, Shape
from lofit_kernels.shapes import SHAPES

# a rehearsal has no device of the table: this row stands in, so that the summary can be rehearsed too
STAND_IN = "H200"
_PEERS = {"floor": "floor", "hook": "hook", "compiled_hook": "compiled hook"}


@dataclass(frozen=True)
class Compared:
    """A timed row of a projection beside its prediction.

    measured, low, high, predicted: time / the floor's. Milliseconds are of one forward and backward; host_ms of
    launching it. kernels: that the prediction counts. launch_bound: whether it is most of all their shortest times.
    """

    row: str
    peer: str
    measured: float
    low: float
    high: float
    predicted: float
    measured_ms: float
    predicted_ms: float
    host_ms: float
    kernels: int
    launch_bound: bool

    @property
    def miss(self) -> float:
        """How many times too large or too small the predicted ratio is; at least 1."""
        return math.exp(abs(math.log(self.measured / self.predicted)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the miss."""
        return asdict(self) | {"miss": self.miss}


def device_of(name: str, rehearsal: bool) -> Device | None:
    """The roofline's row of a device by its name, None for one it does not know; STAND_IN in a rehearsal."""
    return roofline.DEVICES[STAND_IN] if rehearsal else roofline.device_like(name)


def shape_of(model: str, setting: str, T: int, itemsize: int = 2) -> Shape:
    """The roofline's shape of a model's projection in a row of `operators.SETTINGS`."""
    layer = SHAPES[model]
    counts = {None: 0, "all": layer.H, "few": len(few_heads(layer.H))}
    n_scale, n_offset = (counts[which] for which in SETTINGS[setting])
    return Shape(T, layer.N, layer.H, layer.D, n_scale=n_scale, n_offset=n_offset, itemsize=itemsize)


def path_of(peer: str, shape: Shape, dtype: torch.dtype) -> tuple[str, str] | None:
    """(forward, backward) as the roofline names them, of a row of `operators.OPERATORS`; None for one it lacks."""
    if peer in _PEERS:
        return PATHS[_PEERS[peer]]
    parts = {} if peer == "ours" else dict(zip(("form", "backend", "gemm"), peer.split(), strict=False))
    many = is_many(shape.n_scale, shape.H)
    case = {"has_scale": shape.n_scale > 0, "many_heads": many, "has_offset": shape.n_offset > 0}
    try:
        chosen = plan(**case, dtype=dtype, device_type="cuda", **parts)
    except ValueError:
        return None
    return chosen.forward, chosen.backward


def compared_rows(rows: list[dict[str, Any]], device: Device) -> Iterator[Compared]:
    """Every timed projection beside its prediction; rows of layers and what the roofline does not know are left out."""
    for row in rows:
        if row["level"] != "projection":
            continue
        dtype = getattr(torch, row["dtype"])
        shape = shape_of(row["model"], row["setting"], row["T"], dtype.itemsize)
        for peer, found in row.get("peers", {}).items():
            path = path_of(peer, shape, dtype) if "vs_floor" in found else None
            if path is None:
                continue
            predicted, times = roofline.predict(path, shape, device), found["vs_floor"]
            yield Compared(
                gpu_report.heading(row),
                peer,
                times["median"],
                times["low"],
                times["high"],
                predicted.ratio,
                found["ms"],
                1e3 * predicted.seconds,
                found["host_ms"],
                predicted.kernels,
                predicted.kernels * device.launch > predicted.seconds / 2,
            )


def added_to_a_step(group: dict[str, Any], device: Device) -> Iterator[dict[str, Any]]:
    """What LoFiT by each peer adds to a round of whole steps, in milliseconds: measured above the floor, and predicted.

    group: as `whole_steps.time_steps` answers. The floor is that of the same setting. Predicted for the tokens of a
    round at once: the attention, the optimizer and the host are not in it.
    """
    floors = {row["setting"]: row for row in group.get("rows", []) if row["peer"] == "floor" and "ms_per_round" in row}
    tokens = sorted(group.get("real_tokens", [1]))[len(group.get("real_tokens", [1])) // 2]
    shape = shape_of(group["model"], group["step"], tokens)
    for row in group.get("rows", []):
        floor = floors.get(row["setting"])
        path = path_of(row["peer"], shape, torch.bfloat16) if row["peer"] in ("ours", "hook", "compiled_hook") else None
        if path is None or floor is None or "ms_per_round" not in row:
            continue
        bare = roofline.predict(PATHS["floor"], shape, device).seconds
        added = 1e3 * group["layers"] * (roofline.predict(path, shape, device).seconds - bare)
        yield {
            "model": group["model"],
            "step": group["step"],
            "peer": row["peer"],
            "setting": row["setting"],
            "measured_ms": row["ms_per_round"] - floor["ms_per_round"],
            "predicted_ms": added,
        }
