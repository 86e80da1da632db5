"""Frozen weights in oneDNN's layout, once instead of in every product: which linears, where it pays, and the scope."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from lofit_fast.models.shared_pages import memory_shares
from lofit_fast.patching.frozen_linear import products_of
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.placement import device_of, dtype_of, is_dense
from lofit_fast.patching.prepacked import is_prepacked, is_replaced, prepack, undo_prepack
from lofit_kernels.prepacked_linear import PrepackedWeight, refusal

# weights of a linear from which the layout is worth a call of oneDNN, which takes some hundredths of a millisecond:
# SmolLM2's MLPs and head, and not its attention
LEAST = 2**19
# of the machine's memory, what both layouts of all weights may take
SHARE = 0.2
# what a control group of Linux says its memory is bounded by, version 2 and 1
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """A scope in which a float32 model's large plain frozen linears multiply by weights in oneDNN's layout.

    model: patched or not, on a CPU. The output head is one of them; the projections that vectors act on are not. Each
    direction's layout is made when it is first used, as many bytes as the weight has. A weight that is seen to change
    inside the scope is multiplied by plainly from then on; compiled layers refuse it. Results differ by rounding.
    Linears that are prepacked or in 8 bits already stay so. Afterwards every module is as it was.
    Raises ValueError, before anything is changed, as `prepacking_refusal` says.
    """
    if reason := prepacking_refusal(model):
        raise ValueError(reason)
    # by the id of a weight: linears that share one share its layout
    held: dict[int, PrepackedWeight] = {}
    done: list[tuple[nn.Linear, PrepackedWeight]] = []
    try:
        for linear in prepackable(model):
            weight = linear.weight
            if id(weight) not in held:
                held[id(weight)] = PrepackedWeight(weight)
            # before it is done: an interrupt may come between the two
            done.append((linear, held[id(weight)]))
            prepack(*done[-1])
        yield
    finally:
        for linear, weight in done:
            undo_prepack(linear, weight)


def prepacking_refusal(model: nn.Module) -> str | None:
    """Why a model's weights cannot be prepacked here, as a sentence; None where they can."""
    if device_of(model).type != "cpu" or dtype_of(model) != torch.float32:
        return f"prepacked weights are for float32 models on a CPU, got {dtype_of(model)} on {device_of(model)}"
    if reason := refusal():
        return f"prepacked weights cannot be used here: {reason}"
    # in a scope of theirs already
    taken = any(is_prepacked(module) or products_of(module) is not None for module in model.modules())
    if not taken and not prepackable(model):
        return "plain frozen linears are prepacked, and the model has none"
    return None


def pays_to_prepack(model: nn.Module) -> bool:
    """The rule of "auto": linears of `LEAST` weights, whose layouts fit into `SHARE` of the machine's memory.

    Memory is that of the machine or of the control group, free or not, so that the answer is the same every time.
    """
    if prepacking_refusal(model):
        return False
    weights = {id(linear.weight): linear.weight for linear in prepackable(model)}.values()
    taken = 2 * sum(weight.numel() * weight.element_size() for weight in weights)
    large = any(weight.numel() >= LEAST for weight in weights)
    return large and taken * memory_shares() <= SHARE * memory_bytes()


def prepackable(model: nn.Module) -> list[nn.Linear]:
    """The plain frozen float32 linears of a model that no vectors act on: those of `LEAST` weights, or all if none is.

    So a model of small ones is prepacked where that is asked for.
    """
    tuned = {id(module.inner) for module in model.modules() if isinstance(module, LofitLinear)}
    found = [module for module in model.modules() if id(module) not in tuned and _is_prepackable(module)]
    return [module for module in found if module.weight.numel() >= LEAST] or found


def _is_prepackable(module: nn.Module) -> bool:
    """Whether it is exactly an nn.Linear with a forward of its class and frozen numbers; hooks go on as they are."""
    if type(module) is not nn.Linear or is_replaced(module) or is_prepacked(module):
        return False
    # what computes its weight in a hook has it elsewhere
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or (bias is None and module.bias is not None):
        return False
    return all(_is_frozen_here(numbers) for numbers in (weight, bias) if numbers is not None)


def _is_frozen_here(numbers: nn.Parameter) -> bool:
    on_cpu = numbers.device.type == "cpu" and numbers.dtype == torch.float32
    return on_cpu and is_dense(numbers) and numbers.numel() > 0 and not numbers.requires_grad


def memory_bytes() -> int:
    """The machine's memory, or what the control group of this process is bounded by; 0 where a system does not say."""
    if not hasattr(os, "sysconf"):
        return 0
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        # no such file, or "max"
        with suppress(OSError, ValueError):
            found = min(found, int(Path(path).read_text()))
    return found
