"""Is one method better than another on the same questions? The paired bootstrap, and mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 10_000
_STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
# of a block of draws, so that many questions take little memory
_BLOCK = 1000


@dataclass(frozen=True)
class Resampled:
    """What resampling says of the mean of first - second.

    low, high: its percentile interval. p: two-sided, of "the two do equally well".
    """

    low: float
    high: float
    p: float


def paired_bootstrap(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 42,
) -> Resampled:
    """The mean of first - second, resampled over seeds and over questions at once (Efron and Tibshirani 1993, ch. 16).

    first, second: per seed a number per question, both in the same order. Means of n draws from n seeds vary by
    (n - 1) / n of what another n seeds would bring, so each seed's distance from their mean is widened to make up for
    it. Where seeds differ far more than questions can, two or three are too few for any interval to hold what it says.
    p is the share of resamples around zero at least as far from it as what was seen, counting what was seen as one:
    never 0. One resampling makes both, so that p and the interval agree.
    Raises ValueError for no seeds or questions, or another number of either.
    """
    pair = [torch.tensor(hits, dtype=torch.float64) for hits in (first, second)]
    if pair[0].shape != pair[1].shape or not pair[0].numel():
        raise ValueError(f"expected hits of the same seeds and questions, got {[tuple(p.shape) for p in pair]}")
    difference = pair[0] - pair[1]
    n_seeds, per_question = len(difference), difference.mean(0)
    if n_seeds > 1:
        difference = per_question + (difference - per_question) * math.sqrt(n_seeds / (n_seeds - 1))
    draw = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        seeds, questions = (torch.randint(n, (count, n), generator=draw) for n in difference.shape)
        blocks.append(difference[seeds].mean(1).gather(1, questions).mean(1))
    means, seen = torch.cat(blocks), per_question.mean()
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    # equal differences must not fall apart by rounding
    as_far = int(((means - seen).abs() >= seen.abs() - 1e-12).sum())
    return Resampled(low, high, (as_far + 1) / (resamples + 1))


def stars(p: float) -> str:
    """* below 0.05, ** below 0.01, *** below 0.001, nothing otherwise."""
    return next((text for limit, text in _STARS if p < limit), "")


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation over seeds; no spread for a single one. Raises ValueError for none."""
    if not values:
        raise ValueError("expected at least one value, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
