"""What autotune finds on this device: the fastest right path for a projection, and the file that keeps it."""

from __future__ import annotations

from typing import Any

import torch

from lofit_kernels.answers import Key, Path, answers_content, device_name
from lofit_kernels.autotune import autotune
from lofit_kernels.roofline import Shape
from lofit_kernels.shapes import SHAPES


def measured_answers(task: dict[str, Any]) -> dict[str, Any]:
    """One answer: for a model's projection of T tokens with that share of its heads scaled.

    task: "model", "T", "share", "dtype", and on a CPU "backends", for which there is no default with Triton.
    """
    layer, dtype, device = SHAPES[task["model"]], getattr(torch, task["dtype"]), torch.device(task["device"])
    scaled = max(1, round(task["share"] * layer.H))
    shape = Shape(task["T"], layer.N, layer.H, layer.D, n_scale=scaled, itemsize=dtype.itemsize)
    task["now"](f"autotune {task['model']} T={task['T']}")
    (answer,) = autotune([shape], dtype, device, backends=task.get("backends"))
    row = {"case": answer.case._asdict(), "path": answer.chosen._asdict(), **answer.evidence()}
    return {"row": row, "device_name": device_name(device)}


def answers_file_content(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the file that `lofit_kernels` reads, of rows as `measured_answers` gives them."""
    found = {}
    for row in rows:
        evidence = {key: value for key, value in row.items() if key not in ("case", "path")}
        found[Key(**row["case"])] = Path(**row["path"]), evidence
    return answers_content(name, found)
