"""Is one method better than another on the same questions? The paired bootstrap, and mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

RESAMPLES = 10_000
_STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
# of a block of draws, so that many questions take little memory
_BLOCK = 1000


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 42
) -> float:
    """Two-sided p-value of "the two do equally well", from resampled questions (Efron and Tibshirani 1993, ch. 16).

    first, second: a number per question, in the same order. The mean difference is resampled around zero; p is the
    share of resamples at least as far from zero as what was seen, counting what was seen as one: never 0.
    Raises ValueError for no questions, or another number of them.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"expected hits of the same questions, got {len(first)} and {len(second)}")
    difference = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    seen = difference.mean().abs()
    centred = difference - difference.mean()
    draw = torch.Generator().manual_seed(seed)
    as_far = 0
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        questions = torch.randint(len(centred), (count, len(centred)), generator=draw)
        # equal differences must not fall apart by rounding
        as_far += int((centred[questions].mean(1).abs() >= seen - 1e-12).sum())
    return (as_far + 1) / (resamples + 1)


def paired_interval(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 42,
) -> tuple[float, float]:
    """The percentile interval of the mean of first - second, resampled over seeds and over questions at once.

    first, second: per seed a number per question, both in the same order. With few seeds it is a rough one: what
    another seed would do is known from those alone.
    Raises ValueError for none, or another number of either.
    """
    pair = [torch.tensor(hits, dtype=torch.float64) for hits in (first, second)]
    if pair[0].shape != pair[1].shape or not pair[0].numel():
        raise ValueError(f"expected hits of the same seeds and questions, got {[tuple(p.shape) for p in pair]}")
    difference = pair[0] - pair[1]
    draw = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        seeds, questions = (torch.randint(n, (count, n), generator=draw) for n in difference.shape)
        means.append(difference[seeds].mean(1).gather(1, questions).mean(1))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high


def stars(p: float) -> str:
    """* below 0.05, ** below 0.01, *** below 0.001, nothing otherwise."""
    return next((text for limit, text in _STARS if p < limit), "")


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation over seeds; no spread for a single one. Raises ValueError for none."""
    if not values:
        raise ValueError("expected at least one value, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
