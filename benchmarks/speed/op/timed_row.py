"""What one row of the op and layer timings is. Imports no torch, so that a process without it can list rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TimedRow:
    """A group of timings that are comparable: every peer, side by side.

    level: "projection" or "layer". model: a row of `lofit_kernels.shapes.SHAPES`.
    """

    level: str
    model: str
    setting: str
    T: int
    dtype: str = "bfloat16"

    def task(self, device: str, peers: list[str], rounds: int, seconds: float) -> dict[str, Any]:
        """What `time_projection` or `time_layer` is asked for."""
        return {"kind": self.level, **vars(self), "device": device, "peers": peers} | {
            "rounds": rounds,
            "seconds": seconds,
        }
