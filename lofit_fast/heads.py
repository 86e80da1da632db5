"""The best heads by their scores, (layers, heads), and files of heads."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from lofit_fast.config import Head, check_top


def select_heads(scores: Tensor, top: int | float, min_layer: int = 0) -> list[Head]:
    """The best heads as (layer, head), best first; ties go to the lower layer, then the lower head.

    scores: (layers, heads), minus infinity where a head is out of the running.
    top: a count, or a fraction of the heads in the running (rounded, at least one).
    min_layer: heads of layers below it are out of the running.
    Raises ValueError for a top out of range, more heads than there are, or a score that is not a number.
    """
    check_top(top)
    if scores.dim() != 2:
        raise ValueError(f"expected scores of shape (layers, heads), got {tuple(scores.shape)}")
    if scores.isnan().any() or scores.isposinf().any():
        raise ValueError("head scores are not finite: step 1 diverged; try a lower select_lr")
    layers = torch.arange(len(scores), device=scores.device)
    flat = scores.where((layers >= min_layer).unsqueeze(1), -math.inf).flatten()
    available = int((flat > -math.inf).sum())
    count = top if isinstance(top, int) else max(1, round(top * available))
    if count > available:
        raise ValueError(f"asked for the top {count} heads, but only {available} have a score")
    best = flat.argsort(descending=True, stable=True)[:count]
    return [divmod(int(i), scores.shape[1]) for i in best]


def read_heads(path: Path | str) -> list[Head]:
    """The heads of a heads.json, as a run writes it, or of a plain JSON list of pairs.

    Raises FileNotFoundError for no such file, ValueError for one without heads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of heads: {path}")
    try:
        content = json.loads(path.read_text())
        return [(layer, head) for layer, head in (content["heads"] if isinstance(content, dict) else content)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} holds no heads: expected {{"heads": [[layer, head], ...]}}') from error


def jaccard(first: list[Head], second: list[Head]) -> float:
    """Overlap of two head sets: |A and B| / |A or B|, 1.0 when both are empty."""
    union = set(first) | set(second)
    return len(set(first) & set(second)) / len(union) if union else 1.0
