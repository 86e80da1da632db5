"""Products with frozen weights in 8 bits: which linears of a model take them, where, and the scope in which they do."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lofit_fast.patching.architectures import decoder_layers, inputs_of, text_config
from lofit_fast.patching.frozen_linear import compute_in_8_bits, compute_in_full, products_of
from lofit_fast.patching.peft_layers import is_tuner_layer
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.patching.plain_linear import plain_tensors
from lofit_fast.training.engine.outlier_columns import outlier_columns
from lofit_kernels.product_kinds import ProductKind, is_fast_on_cpu, kind_for

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def quantized(model: nn.Module, precision: str) -> Iterator[None]:
    """A scope in which the frozen linears of the decoder layers compute y and dz in 8 bits.

    model: patched or not. precision: "int8" or "fp8". Only passes that build a graph compute so: whatever runs without
    gradients (evaluation, generation, the prefix cache) computes in full, and so does a linear whose weight is trained
    inside the scope. The weights are quantized when they are first used, once for each direction, and must not change
    inside the scope. Afterwards every module is as it was. On entering, one forward without gradients finds the columns
    of inputs that y takes in full, see `outlier_columns`. A linear that is not plain, not frozen, under LoRA, or of
    sizes that the kind does not take, computes in full, and so do routers of experts; a warning says how many there
    are.

    Raises:
        ValueError: before anything is changed, where the device, the model or its dtype does not allow it.
    """
    kind = kind_for_model(model, precision)
    taken, left = frozen_linears(model, kind)
    if left:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left.items())
        total = len(taken) + sum(left.values())
        warnings.warn(f"{precision} products: of {total} linears {reasons}: computed in full", stacklevel=4)
    columns = outlier_columns(model, taken, precision)
    done: list[nn.Linear] = []
    try:
        for linear in taken:
            compute_in_8_bits(linear, kind, columns.get(linear))
            done.append(linear)
        yield
    finally:
        for linear in done:
            compute_in_full(linear)


def kind_for_model(model: nn.Module, precision: str) -> ProductKind:
    """The kind of product that a model's frozen linears would be computed with. Raises as `quantized` does."""
    dtype = dtype_of(model)
    if dtype not in _DTYPES:
        raise ValueError(f"{precision} products are for models in 16 or 32 bits, got {dtype}")
    devices = {parameter.device for layer in decoder_layers(model) for parameter in layer.parameters()}
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"{precision} products take a model on devices of one type, got {sorted(map(str, devices))}")
    kind = kind_for(precision, device_of(model))
    if any(_checkpoints_twice(layer) for layer in decoder_layers(model)):
        raise ValueError(
            f"{precision} products are computed where a graph is built, and reentrant checkpoints build none in their "
            'first run: use gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    if not (found := frozen_linears(model, kind))[0]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in found[1].items())
        raise ValueError(
            f"{precision} products take plain frozen linears in the decoder's layers, got none "
            f"({reasons or 'no linears at all'})"
        )
    return kind


def settled_products(model: nn.Module, asked: str, *, few_rows: bool = False) -> str:
    """What "auto" means: "int8" where a float32 model is on a CPU that is known to be faster so, else "full".

    few_rows: whether a batch is a few tokens through layers that are not compiled, as answers after kept prompts are.
    Quantizing them takes longer than it saves: "auto" is "full" there.
    Anything else that was asked for is returned as it is. Raises ValueError where it is not to be had.
    """
    if asked == "full":
        return asked
    if asked != "auto":
        kind_for_model(model, asked)
        return asked
    if few_rows or device_of(model).type != "cpu" or dtype_of(model) != torch.float32 or not is_fast_on_cpu():
        return "full"
    try:
        kind_for_model(model, "int8")
    except ValueError:
        return "full"
    return "int8"


def frozen_linears(model: nn.Module, kind: ProductKind) -> tuple[list[nn.Linear], dict[str, int]]:
    """(the linears of the decoder layers that can be quantized, reason -> how many others there are)."""
    taken: list[nn.Linear] = []
    left: Counter[str] = Counter()
    seen: set[int] = set()
    experts = _expert_counts(model)
    for layer in decoder_layers(model):
        of_tuners = {id(part) for module in layer.modules() if is_tuner_layer(module) for part in module.modules()}
        for module in layer.modules():
            if id(module) in seen or not _is_linear(module):
                continue
            seen.add(id(module))
            reason = _why_in_full(module, kind, id(module) in of_tuners, experts)
            if reason is None:
                taken.append(module)
            else:
                left[reason] += 1
    return taken, dict(left)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear by itself, whatever quantizes it, rather than a wrapper around one."""
    return inputs_of(module) is not None and not any(inputs_of(part) for part in module.children())


def _expert_counts(model: nn.Module) -> set[int]:
    """The outputs that a router of the model's experts may have; none in a model without experts."""
    settings = vars(text_config(model)).items()
    counts = {value for name, value in settings if name.endswith("experts") and type(value) is int and value > 1}
    # a gate of shared experts has one
    return counts | {1} if counts else counts


def _why_in_full(linear: nn.Module, kind: ProductKind, of_tuner: bool, experts: set[int]) -> str | None:
    """What keeps a linear from being computed in 8 bits, as a phrase after a number; None where nothing does.

    experts: numbers of outputs that routers have.
    """
    if of_tuner:
        return "under LoRA"
    if products_of(linear) is not None:
        return "in 8 bits already"
    plain = plain_tensors(linear)
    if plain is None:
        return "not plain (quantized, sharded, offloaded or hooked)"
    weight, bias = plain
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "not frozen"
    if weight.shape[0] in experts:
        # rounded a little otherwise, it would choose other experts
        return "with as many outputs as there are experts"
    if weight.is_meta or weight.dtype not in _DTYPES or any(size % kind.multiple for size in weight.shape):
        return f"of a size or dtype that {kind.name} does not take"
    return None


def _checkpoints_twice(layer: nn.Module) -> bool:
    """Whether a layer runs under reentrant checkpoints: first without a graph, then with one."""
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", None) or {}
    return options.get("use_reentrant", False)
