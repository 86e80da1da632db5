"""Which input columns of a model's linears are too large for 8 bits, found by one forward over arbitrary tokens.

A row of activations is rounded to steps of its largest number. In language models that number is nearly always in one
of a few columns, the same for every token and every text: so no example is needed to find them, and a run that goes on
finds those that it had.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lofit_fast.models.trials import all_logits, as_the_base, ordinary_tokens, said_of, trying
from lofit_fast.patching.placement import device_of
from lofit_kernels.quantized_linear import FullColumns

# columns of a linear, and of how many inputs it takes one at most: the product in full stays a thin one
COLUMNS, INPUTS_PER_COLUMN = 8, 16
TOKENS = 64


def outlier_columns(model: nn.Module, linears: Iterable[nn.Linear], precision: str) -> dict[nn.Linear, FullColumns]:
    """The columns of each linear's inputs that have the largest magnitudes.

    model: runs once as the base, on fixed tokens, in eval mode and without gradients. Modes, random numbers and hooks
    are afterwards as they were. Linears that are given one tensor share their columns; one that the forward does not
    reach, or that has few inputs, has none. Where the forward fails none has, and a warning says so.
    """
    found: dict[nn.Linear, FullColumns] = {}
    latest: list = [None, None]

    def note(linear: nn.Linear, args: tuple) -> None:
        if linear in found or not args or not args[0].numel():
            return
        if args[0] is not latest[0]:
            latest[:] = args[0], _largest(args[0])
        if latest[1] is not None:
            found[linear] = latest[1]

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        # vectors change in training, and columns must not
        with trying(model), as_the_base(model):
            all_logits(model, {"input_ids": torch.tensor([ordinary_tokens(model, TOKENS)], device=device_of(model))})
    # whatever a model that is not given its tokens may raise
    except Exception as error:
        warnings.warn(
            f"{precision} products: outlier columns are rounded like all others, for the model does not run on "
            f"tokens alone ({said_of(error)})",
            stacklevel=5,
        )
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _largest(x: Tensor) -> FullColumns | None:
    """Of the rows (..., K)."""
    K = x.shape[-1]
    number = min(COLUMNS, K // INPUTS_PER_COLUMN)
    if not number:
        return None
    largest = x.detach().flatten(0, -2).abs().amax(0).nan_to_num(0.0)
    return FullColumns(largest.topk(number).indices.sort().values, K)
