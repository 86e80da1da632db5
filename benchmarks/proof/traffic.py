"""Counts launches and bytes of what runs inside a scope, exactly and without a GPU.

ATen work is seen by a dispatch mode, Triton launches by `launch.recording`, which notes them without running them.
Counted are: one launch for every ATen operator that is neither a view nor an allocation (two for those that fill a
tensor and then write into it) and one for every Triton launch; and the bytes those read and write, each element of each
operand once. Of a GEMM, the two matrices and the product are left out; whatever else it reads or writes is counted.
An operator that is in neither table below raises instead of being guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
    "squeeze_",
}
_GEMMS = {"mm", "addmm", "bmm"}
_FILLS = {"zeros", "new_zeros", "zeros_like", "full", "new_full", "ones", "ones_like", "arange", "zero_", "fill_"}
_ELEMENTWISE = {
    "_to_copy",
    "abs",
    "add",
    "add_",
    "addmv_",
    "addcmul",
    "bitwise_and",
    "bitwise_xor",
    "__and__",
    "__rshift__",
    "clamp",
    "clone",
    "cat",
    "copy_",
    "index",
    "index_add_",
    "index_select",
    "lt",
    "mul",
    "mul_",
    "mv",
    "stack",
    "sub",
    "sum",
    "where",
}
# a fill or a copy of the whole, then the part
_TWO_STAGES = {"index_copy", "slice_backward"}


def launches_of(operator: Any) -> int:
    """Of an ATen operator: none of a view or an allocation, two of what fills a tensor and then writes into it."""
    name = operator.name().removeprefix("aten::").split(".")[0]
    return 0 if operator.is_view or name in _FREE else 2 if name in _TWO_STAGES else 1


@dataclass
class Traffic:
    """What was counted. `gemms` of the `launches` are matrix products; `bytes` is everything that is not one."""

    launches: int = 0
    gemms: int = 0
    bytes: int = 0


def _size(x: Tensor) -> int:
    """Bytes of the elements of `x`, those that a broadcast repeats once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= 1 if stride == 0 and size > 1 else size
    return elements * x.element_size()


def _sizes(*found: Tensor | None) -> int:
    return sum(_size(x) for x in found if x is not None)


class _Aten(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.name().removeprefix("aten::").split(".")[0]
        if operator.is_view or name in _FREE:
            return result
        given = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        inputs = [x for x in tree_flatten((args, given))[0] if isinstance(x, Tensor)]
        written = _sizes(*(x for x in tree_flatten(result)[0] if isinstance(x, Tensor)))
        self.traffic.launches += 1
        # a matrix times a vector reads its matrix for that alone: no GEMM, whatever the operator is called
        if name in _GEMMS and min(result.shape) > 1:
            self.traffic.gemms += 1
            self.traffic.bytes += _sizes(*inputs[:-2])
        elif name in _FILLS:
            self.traffic.bytes += written
        elif name == "copy_":
            self.traffic.bytes += _size(inputs[1]) + written
        elif name == "index_copy_":
            # what it leaves alone is neither read nor written
            self.traffic.bytes += _sizes(*inputs[1:]) + _size(inputs[-1])
        elif name in _TWO_STAGES:
            part = inputs[-1]
            whole = _size(inputs[0]) if name == "index_copy" else 0
            self.traffic.launches += 1
            self.traffic.bytes += whole + written + 2 * _size(part)
        elif name in _ELEMENTWISE or name in _GEMMS:
            self.traffic.bytes += _sizes(*inputs) + written
        else:
            raise NotImplementedError(f"{operator.name()} is in none of the tables of {__name__}: add it to one")
        return result


def _columns(x: Tensor, *heads: Tensor | None, D: int) -> int:
    """Bytes of x's columns that belong to any of the listed heads."""
    listed = set().union(*(h.tolist() for h in heads if h is not None))
    return x.shape[0] * len(listed) * D * x.element_size()


def _affine_bwd(a: dict[str, Any]) -> int:
    D, scale_heads = a["D"], a["scale_heads"]
    swept = _size(a["grad"]) if a["EVERY_HEAD"] else _columns(a["grad"], scale_heads, a["offset_heads"], D=D)
    written = 0
    if a["dz"] is not None:
        written = _size(a["dz"]) if a["EVERY_HEAD"] else _columns(a["dz"], scale_heads, D=D)
    read = 0 if a["z"] is None else _columns(a["z"], scale_heads, D=D)
    return swept + written + read + _sizes(a["scale"], scale_heads, a["offset_heads"], a["partials"])


# kernel -> bytes it reads and writes, from its arguments by name; a GEMM's own matrices are left out
_KERNELS: dict[str, Callable[[dict[str, Any]], int]] = {
    "_affine_fwd_kernel": lambda a: _sizes(
        a["z"], a["x"], a["scale"], a["scale_heads"], a["offset"], a["offset_heads"]
    ),
    "_affine_delta_fwd_kernel": lambda a: (
        _columns(a["z"], a["scale_heads"], D=a["D"]) + _sizes(a["r"], a["scale"], a["scale_heads"])
    ),
    "_affine_bwd_kernel": _affine_bwd,
    "_offset_fold_kernel": lambda a: (
        _columns(a["weight"], a["heads"], D=a["D"]) + _sizes(a["offset"], a["heads"], a["bias"], a["out"])
    ),
    "_column_sum_kernel": lambda a: _sizes(a["grad"], a["partials"]),
    "_offset_bwd_kernel": lambda a: (
        _columns(a["weight"], a["heads"], D=a["D"]) + _sizes(a["column_sum"], a["heads"], a["partials"])
    ),
    "_sum_partials_kernel": lambda a: _sizes(a["partials"], a["first"], a["second"]),
}
_GEMM_KERNELS: dict[str, Callable[[dict[str, Any]], int]] = {
    "_delta_linear_kernel": lambda a: _sizes(a["addend"], a["scale"], a["scale_heads"]),
    "_prologue_linear_kernel": lambda a: _sizes(a["addend"], a["gain"]),
    "_affine_linear_bwd_kernel": lambda a: (
        (0 if a["z"] is None else _columns(a["z"], a["scale_heads"], D=a["D"] * a["UNIT"]))
        + _sizes(a["scale"], a["scale_heads"], a["offset_heads"], a["partials"])
    ),
}


def _triton(traffic: Traffic, launches: list) -> None:
    for kernel, positional, keywords in launches:
        arguments = {**dict(zip(kernel.arg_names, positional, strict=False)), **keywords}
        name = kernel.__name__
        if name not in _KERNELS and name not in _GEMM_KERNELS:
            raise NotImplementedError(f"{name} is in none of the tables of {__name__}: add it to one")
        traffic.launches += 1
        traffic.gemms += name in _GEMM_KERNELS
        traffic.bytes += {**_KERNELS, **_GEMM_KERNELS}[name](arguments)


@contextmanager
def counted(arch: str = "sm_90") -> Iterator[Traffic]:
    """Counts what runs inside; complete when the scope ends. Triton kernels are noted for `arch`, not run: what they
    would have written is undefined."""
    from lofit_kernels.gpu.launch import recording

    traffic = Traffic()
    with recording(arch) as recorded, _Aten(traffic), torch.autograd.set_multithreading_enabled(False):
        yield traffic
    _triton(traffic, recorded.launches)
