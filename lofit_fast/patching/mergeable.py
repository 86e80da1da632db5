"""Which modules merging may write into: linears of known arithmetic whose weights are plain numbers of their own."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from lofit_fast.patching.frozen_linear import products_of
from lofit_fast.patching.prepacked import is_replaced
from lofit_fast.patching.torch_linear import is_torchs_own

# class -> whether its weight is stored as (K, N): what computes x W^T + b and nothing else
_LINEARS = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
# what may be given a bias of zeros beside them
_BIASED = ("torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.conv.Conv1d")


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is (K, N), as Conv1D has it, rather than (N, K)."""
    return _LINEARS.get(_name(type(linear)), False)


def why_not_plain(linear: nn.Module) -> str | None:
    """What keeps W and b of a projection from being rewritten, as a phrase; None where nothing does."""
    name = type(linear).__name__
    if _name(type(linear)) not in _LINEARS:
        return name
    if "weight" not in linear._parameters:
        return f"{name} whose weight is computed from other parameters"
    if products_of(linear) is not None:
        return f"{name} that computes in 8 bits for now, until the scope of frozen_products is over"
    # accelerate's moves inputs between devices, and no numbers
    if is_replaced(linear) and not hasattr(linear, "_hf_hook"):
        return f"{name} with a forward of its own"
    if isinstance(linear, nn.Linear) and not is_torchs_own():
        return f"{name} while nn.Linear.forward or torch.nn.functional.linear is replaced for the whole process"
    if linear._forward_pre_hooks or linear._forward_hooks:
        return f"{name} with forward hooks on it, which may change what it computes"
    for part, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None and (reason := why_not_dense(tensor)):
            return f"{name} whose {part} is {reason}"
    return None


def why_no_zeros(module: nn.Module) -> str | None:
    """What keeps a module without a bias from being given one of zeros, as a phrase; None where nothing does."""
    # zeros change nothing, whoever listens
    if "bias" not in module._parameters or _name(type(module)) not in (*_LINEARS, *_BIASED):
        return type(module).__name__
    reason = why_not_dense(module.weight)
    return f"{type(module).__name__} whose weight is {reason}" if reason else None


def why_not_dense(tensor: Tensor) -> str | None:
    """What a tensor is instead of ordinary floating numbers in memory, as a phrase; None for such numbers."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"quantized ({tensor.dtype})"
    if tensor.device.type == "meta":
        return "not in memory (offloaded, or never loaded)"
    if tensor.numel() == 0 or tensor.untyped_storage().nbytes() == 0:
        return "sharded (empty on this process)"
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "one number seen many times (expanded)"
    return None


def users_of_tensors(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter, by its `data_ptr`: several where weights are tied."""
    users: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.device.type != "meta" and type(parameter) is nn.Parameter:
                users[parameter.data_ptr()].append(module)
    return users


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
