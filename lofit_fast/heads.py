"""The best heads by their scores, (layers, heads), and files of heads."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lofit_fast.config import Head, check_top, shown
from lofit_fast.files import given_path, read_json
from lofit_fast.sealed import unsealed

# no model has as many layers, or heads
_MOST = 2**31


def select_heads(scores: Tensor, top: int | float, min_layer: int = 0) -> list[Head]:
    """The best heads as (layer, head), best first; ties go to the lower layer, then the lower head.

    scores: (layers, heads), minus infinity where a head is out of the running.
    top: a count, or a fraction of the heads in the running (rounded, at least one).
    min_layer: heads of layers below it are out of the running.
    Raises ValueError for a top out of range, more heads than there are, or a score that is not a number; TypeError for
    scores that are no tensor.
    """
    check_top(top)
    if not isinstance(scores, Tensor):
        raise TypeError(f"expected scores to be a tensor (layers, heads), got {type(scores).__name__}")
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


def scores_as_json(scores: Tensor) -> list[list[float | None]]:
    """(layers, heads) scores as a heads.json has them: null, JSON's None, for the minus infinity of no such head."""
    return [[None if score == -math.inf else score for score in row] for row in scores.tolist()]


def scores_from_json(rows: list[list[float | None]]) -> Tensor:
    """The same back: (layers, heads) float32. Files of earlier releases have minus infinity itself."""
    plain = [[-math.inf if score is None else score for score in row] for row in rows]
    return torch.tensor(plain, dtype=torch.float32)


def heads_of(content: Any, path: Path | str) -> list[Head]:
    """The heads in what a heads.json, or a plain JSON list of pairs, holds. path: the file, for errors.

    Raises ValueError, naming the file, for anything but different pairs of non-negative integers.
    """
    listed = content.get("heads") if isinstance(content, dict) else content
    wrong = [item for item in listed if not _is_pair(item)] if isinstance(listed, list) else [listed]
    if wrong or not listed:
        got = shown(wrong[0] if wrong else listed)
        raise ValueError(
            f'{path} holds no heads: expected {{"heads": [[layer, head], ...]}} of non-negative integers, got {got}'
        )
    heads = [(layer, head) for layer, head in listed]
    if twice := [pair for pair, count in Counter(heads).items() if count > 1]:
        raise ValueError(f"{path} lists heads more than once: {shown(twice)}")
    return heads


def heads_asked(text: str) -> tuple[Head, ...] | Literal["all"]:
    """The heads of the file of that name, or "all". Raises what `read_heads` raises."""
    return "all" if text == "all" else tuple(read_heads(text))


def read_heads(path: Path | str) -> list[Head]:
    """The heads of a heads.json, as a run writes it, of a plain JSON list of pairs, or of a .npy file as lo-fit's.

    Raises FileNotFoundError for no such file, ValueError for one without heads, or damaged, see `heads_of`.
    """
    path = given_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of heads: {path}")
    if path.suffix == ".npy":
        return heads_of(_array(path), path)
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f'{path} holds no heads: expected {{"heads": [[layer, head], ...]}} ({error})') from error
    return heads_of(unsealed(content, path) if isinstance(content, dict) else content, path)


def _array(path: Path) -> Any:
    """What a .npy file of whole numbers holds, as lists: the paper's code (fc2869/lo-fit) saves (heads, 2) so."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no heads: expected an array (heads, 2) of whole numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 2:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{path} holds no heads: expected an array (heads, 2) of whole numbers, got {got}")
    return array.tolist()


def _is_pair(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(type(x) is int and 0 <= x < _MOST for x in item)


def jaccard(first: list[Head], second: list[Head]) -> float:
    """Overlap of two head sets: |A and B| / |A or B|, 1.0 when both are empty."""
    union = set(first) | set(second)
    return len(set(first) & set(second)) / len(union) if union else 1.0
