"""A base that stays as it is and may be quantized: let through Trainer's door, where gradients get through the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from lofit_fast.patching.architectures import inputs_of
from lofit_fast.patching.layer import CUT_OFF
from lofit_fast.patching.placement import device_of, dtype_of, is_dense
from lofit_fast.patching.tensor_parallel import is_placed

# what trainers ask a model
_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


@contextmanager
def admitted(model: nn.Module) -> Iterator[None]:
    """A scope in which a trainer of transformers or TRL can be made for a patched model, quantized or not.

    Trainer's constructor refuses a model that says it `is_quantized` and holds no adapter of PEFT, lest somebody train
    packed weights; those of a patched model are frozen. TRL's rounds to bfloat16 what a bitsandbytes model trains, and
    the vectors are too small for that. Only the constructors ask, so that the scope is for them alone:

        with admitted(model):
            trainer = transformers.Trainer(model, ...)

    Raises ValueError for a quantized model that has nothing to train, or does not let gradients through.
    """
    said = [flag for flag in _FLAGS if getattr(model, flag, False)]
    if not said:
        yield
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("expected a quantized model with something to train, got none: call lofit_fast.patch first")
    check_passes_gradients(model)
    # a wrapper answers for the model in it, and has none of its own
    own = {flag: vars(model)[flag] for flag in said if flag in vars(model)}
    for flag in said:
        setattr(model, flag, False)
    try:
        yield
    finally:
        for flag in said:
            delattr(model, flag)
        vars(model).update(own)


def check_passes_gradients(model: nn.Module) -> None:
    """Raise ValueError for a model with a quantized linear that gives no gradient to its inputs.

    Each kind of linear without a dense weight is asked once, with two rows of ones. Kernels made for inference alone
    cut the graph without a word, and training would go on with what comes along the residual stream.
    """
    asked = set()
    for name, module in model.named_modules():
        width, weight = inputs_of(module), getattr(module, "weight", None)
        if not width or is_dense(weight) or is_placed(weight) or any(inputs_of(part) for part in module.children()):
            continue
        kind = (type(module), type(weight), width)
        if kind not in asked and not _passes(module, width, model):
            of = "" if weight is None else f" of {type(weight).__name__}"
            raise ValueError(f"cannot train through {name}, a {type(module).__name__}{of} {CUT_OFF}")
        asked.add(kind)


def _passes(module: nn.Module, width: int, model: nn.Module) -> bool:
    # what cannot be asked like this fails in training, if it does, and says so
    with suppress(RuntimeError, TypeError, ValueError), torch.enable_grad():
        ones = torch.ones(2, width, device=device_of(module, model), dtype=dtype_of(model), requires_grad=True)
        return module(ones).requires_grad
    return True
