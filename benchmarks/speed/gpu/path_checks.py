"""Is a path right on this device: accuracy against float64, nothing unwritten, nothing overwritten, twice the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.op.operators import OPERATORS, Operator, Projection, projection, step
from lofit_kernels import reference
from lofit_kernels.error_bound import Stage, allowed_error, largest_error, orders, projection_margins, sum_margin
from lofit_kernels.shapes import SHAPES

_ALLOCATORS = ("empty", "empty_like", "empty_strided")
_METHODS = ("new_empty", "new_empty_strided")


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised floating-point memory is NaN inside: an element that nobody writes shows."""
    places = [(torch, name) for name in _ALLOCATORS] + [(Tensor, name) for name in _METHODS]
    before = [getattr(owner, name) for owner, name in places]

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

        return wrapped

    for (owner, name), allocate in zip(places, before, strict=True):
        setattr(owner, name, poison(allocate))
    try:
        yield
    finally:
        for (owner, name), allocate in zip(places, before, strict=True):
            setattr(owner, name, allocate)


def exact(p: Projection) -> tuple[Tensor, ...]:
    """(y, dz, da and dv where there are any) in float64, from the definition."""
    wide = {
        name: x.detach().double() if x is not None and x.is_floating_point() else x for name, x in p.vectors.items()
    }
    z, weight, grad = (x.detach().double() for x in (p.z, p.weight, p.grad))
    gradients = reference.affine_linear_backward(grad, z, weight, None, **wide)
    wanted = (gradients.z, gradients.scale, gradients.offset)
    return (reference.affine_linear(z, weight, None, **wide), *(x for x in wanted if x is not None))


def by_hook(p: Projection) -> tuple[tuple[Tensor, ...], ...]:
    """(y,), (dz,) and, where there are any, da and dv of the eager hook, these in several orders of their sums.

    dv is a sum over tokens and over columns of N; it is computed with either of them first.
    """
    y, dz, *_ = step(OPERATORS["hook"], p)
    sums: list[list[Tensor]] = [[] for _ in p.parameters]
    for t, n in orders(*p.grad.shape, device=p.grad.device):
        z, weight, grad = p.z.detach()[t].requires_grad_(), p.weight[n], p.grad[t][:, n]
        found = step(OPERATORS["hook"], replace(p, z=z, weight=weight, grad=grad))[2:]
        for kept, gradient in zip(sums, found, strict=True):
            kept.append(gradient)
        if p.offset is not None:
            summed = grad.to(p.offset.dtype).sum(0) @ weight.to(p.offset.dtype)
            sums[-1].append(summed.view(-1, p.shape.D)[p.offset_heads])
    return (y,), (dz,), *(tuple(kept) for kept in sums)


def margins(operator: Operator, p: Projection) -> dict[str, float]:
    """By name of a result, how far rounding alone may take its sums: added to what the rule allows.

    The sums are in float32. A peer that rounds the sum of dY over tokens to z's dtype has one more rounding there.
    """
    dense = [
        None if rows is None else rows.new_zeros(p.shape.H, p.shape.D).index_copy(0, heads, rows.detach()).flatten()
        for rows, heads in ((p.scale, p.scale_heads), (p.offset, p.offset_heads))
    ]
    found = projection_margins(p.z, p.weight, p.grad, *dense)
    if operator.rounds_sums:
        weighted = p.grad.double().sum(0).square() @ p.weight.double().square()
        found["dv"] += sum_margin(Stage(1, weighted), dtype=p.z.dtype)
    return found


def problems(operator: Operator, p: Projection, planted: bool = False) -> list[str]:
    """What is wrong with an operator on `p`; empty when it is right. planted: make its y wrong by a hundredth."""
    inputs = [p.z, p.weight, p.grad, *p.parameters]
    before = [x.detach().clone() for x in inputs]
    # from the inputs as they were
    right, eager, allowance = exact(p), by_hook(p), margins(operator, p)
    # a compiler's own allocations are not ours to poison
    if operator.needs == "compiler":
        got, again = step(operator, p), None
    else:
        with poisoned():
            got, again = step(operator, p), step(operator, p)
    if planted:
        got = (got[0] * 1.01, *got[1:])
    found = []
    for name, x, expected, hooked in zip(_names(p), got, right, eager, strict=True):
        if x.shape != expected.shape or x.dtype != hooked[0].dtype:
            found.append(f"{name}: {x.dtype} {tuple(x.shape)}, expected {hooked[0].dtype} {tuple(expected.shape)}")
        elif not x.isfinite().all():
            found.append(f"{name}: {int((~x.isfinite()).sum())} elements were not written or are not finite")
        else:
            error, bound = largest_error(x, expected), allowed_error(expected, *hooked, margin=allowance[name])
            if not error <= bound:
                found.append(f"{name}: error {error:.2e}, allowed {bound:.2e}")
    if again is not None and operator.ours and not planted:
        pairs = zip(_names(p), got, again, strict=True)
        found += [f"{name}: a second call gave other bits" for name, x, y in pairs if not torch.equal(x, y)]
    if not all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True)):
        found.append("an input was overwritten")
    return found


def _names(p: Projection) -> list[str]:
    return ["y", "dz", *(name for name, x in (("da", p.scale), ("dv", p.offset)) if x is not None)]


def check(task: dict[str, Any]) -> dict[str, Any]:
    """One operator on every case of the task: what is wrong, what it cannot express or needs and lacks here.

    task["seeds"]: on so many draws of each case. checked: how many cases and draws were looked at.
    """
    operator = OPERATORS[task["peer"]]
    found, missing, checked = [], set(), 0
    for case, seed in product(task["cases"], range(task.get("seeds", 1))):
        for setting in case["settings"]:
            where = f"{case['model']} T={case['T']} {case['dtype']} {setting}" + (f" seed {seed}" if seed else "")
            task["now"](where)
            shape, dtype = SHAPES[case["model"]], getattr(torch, case["dtype"])
            p = projection(setting, shape, case["T"], dtype, task["device"], seed)
            why = operator.missing(p)
            if why:
                missing.add(why)
                continue
            try:
                found += [f"{where}: {problem}" for problem in problems(operator, p, task["planted"])]
                checked += 1
            except torch.OutOfMemoryError:
                missing.add(f"out of memory at {where}")
            except Exception as failure:
                found.append(f"{where}: {type(failure).__name__}: {str(failure).strip()[:400]}")
                # after an illegal access nothing on this device works any more in this process
                if task["device"] == "cuda":
                    torch.cuda.synchronize()
    return {"checked": checked, "problems": found, "missing": sorted(missing)}
