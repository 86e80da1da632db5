"""Row-wise parallel linears that the op may stand in for: those of which all that happens around z W^T is known.

That is a plain nn.Linear which `tp_plan` of transformers, or `parallelize_module` of torch, has cut by columns, and
which takes tensors of one process and returns such: its inputs are cut first where they are whole, and its outputs are
added up and whole. Nothing else listens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lofit_fast.patching.fully_sharded import is_placed
from lofit_fast.patching.placement import is_dense
from lofit_fast.patching.tensor_parallel import placed_weight
from lofit_fast.patching.torch_linear import is_torchs_own

_TRANSFORMERS = "transformers.distributed.tensor_parallel"
_TORCH = "torch.distributed.tensor.parallel.style"
_LISTENING = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def row_parallel_tensors(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(this process's columns of the weight (N, K_own), the bias (N,)) of a known row-wise linear; None of any other.

    None too for one whose weights are trained.
    """
    weight = placed_weight(linear)
    if type(linear) is not nn.Linear or weight is None or not (_by_transformers(linear) or _by_torch(linear)):
        return None
    if not is_torchs_own():
        return None
    bias = linear.bias
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    with torch.no_grad():
        own = weight.to_local()
        whole = bias.to_local() if is_placed(bias) else bias
    return (own, whole) if is_dense(own) and (whole is None or is_dense(whole)) else None


def _by_transformers(linear: nn.Linear) -> bool:
    style, forward = sys.modules.get(_TRANSFORMERS), vars(linear).get("forward")
    if style is None or forward is None or getattr(forward, "__module__", None) != style.__name__:
        return False
    if any(vars(linear)[kind] for kind in _LISTENING) or getattr(linear, "_hf_quantized_needs_local_tp", False):
        return False
    inside = _enclosed(forward)
    plan, below = inside.get("self"), inside.get("original_forward")
    of_torch = getattr(below, "__func__", None) is nn.Linear.forward and below.__self__ is linear
    return (
        of_torch and type(plan) is style.RowwiseParallel and _whole_outside(plan.output_layouts, plan.use_local_output)
    )


def _by_torch(linear: nn.Linear) -> bool:
    style = sys.modules.get(_TORCH)
    before, after = (list(vars(linear)[kind].values()) for kind in ("_forward_pre_hooks", "_forward_hooks"))
    if style is None or "forward" in vars(linear) or (len(before), len(after)) != (1, 1):
        return False
    if linear._backward_hooks or linear._backward_pre_hooks:
        return False
    take, give = _enclosed(before[0]).get("input_fn"), _enclosed(after[0]).get("output_fn")
    row = style.RowwiseParallel
    taken = isinstance(take, partial) and take.func is row._prepare_input_fn and len(take.args) == 2
    given = isinstance(give, partial) and give.func is row._prepare_output_fn and len(give.args) == 2
    return taken and given and len(give.args[0]) == 1 and _whole_outside(give.args[0][0], give.args[1])


def _whole_outside(layout: Any, local: bool) -> bool:
    """Whether outputs are plain tensors, whole in every process."""
    return local and layout.is_replicate()


def _enclosed(function: Callable) -> Mapping[str, Any]:
    """By name what a function has from the one that it was made in."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
