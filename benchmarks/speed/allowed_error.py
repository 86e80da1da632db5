"""The accuracy rule of every check here: how far from the exact value a correct computation may be."""

import math

import torch


def allowed_error(eager_error: float, largest: float, dtype: torch.dtype) -> float:
    """Twice the error that eager PyTorch makes in the same dtype, or one unit in the last place, whichever is more.

    eager_error: how far eager PyTorch is from the exact value. largest: the largest magnitude of the exact value, at
    which the unit in the last place of dtype is taken.
    """
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0
    return max(2 * eager_error, ulp)
