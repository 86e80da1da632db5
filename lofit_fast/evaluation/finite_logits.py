"""Logits and scores that are not finite: an error that names the prompt, and no answer, score or accuracy of them.

Greedy decoding takes a token of NaNs as of any numbers, and a comparison with NaN is merely false: a model that
overflows in float16 would be judged as one that is always wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lofit_fast.config import shown

_ADVICE = "look at its weights and vectors, or load it in another dtype: float16 overflows where bfloat16 does not"


class FiniteLogits:
    """A logits processor for transformers' `generate`: notes which rows had logits that are not finite.

    at_once: whether to raise at the first one, which reads a number from the device for every token.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self._wrong: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, vocabulary), as they are. Tokens that a model forbids, at minus infinity, are none of it."""
        # the largest number is NaN where any is
        wrong = ~scores.amax(-1).isfinite()
        self._wrong = wrong if self._wrong is None else self._wrong | wrong
        if self.at_once:
            self.check({})
        return scores

    def check(self, prompts: Mapping[int, str]) -> None:
        """Raise FloatingPointError for a row that had such logits. prompts: by row, the prompt in words."""
        if self._wrong is not None and self._wrong.any():
            row = int(self._wrong.nonzero()[0])
            of = f" for {prompts[row]}" if row in prompts else ""
            raise FloatingPointError(f"the model's logits are not finite{of}: {_ADVICE}")


def check_scores(scores: Mapping[tuple[int, int], float], questions: Mapping[int, object]) -> None:
    """Raise FloatingPointError for a score that is no number, by (question, choice). questions: texts, from 0."""
    for (question, choice), value in scores.items():
        if math.isnan(value):
            raise FloatingPointError(
                f"the score of choice {choice + 1} of question {question + 1} ({shown(questions[question])}) is "
                f"{value}: the model's logits are not finite; {_ADVICE}"
            )


def check_log_probs(values: Mapping[int, float]) -> None:
    """Raise FloatingPointError for a row's log-probability that is not finite, by row from 0."""
    for row, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the log-probability of answer {row + 1} is {value}: {_ADVICE}")


def check_activations(z: Tensor, layer: int) -> None:
    """Raise FloatingPointError for a layer's activations that are not finite."""
    if not torch.isfinite(z).all():
        raise FloatingPointError(f"the activations of layer {layer} are not finite: {_ADVICE}")
