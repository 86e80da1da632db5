"""y = x W^T + c and dz = G W with a frozen float32 weight on a CPU, in the layout that oneDNN multiplies by.

A plain product lays the weight out anew each time, or goes through it in an order that suits few shapes. A frozen
weight is laid out once for each direction. Nothing is rounded otherwise than a float32 product is.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lofit_kernels.eager_scopes import as_written, autocast_is_on
from lofit_kernels.held_weight import HeldWeight, held_weight


class PrepackedWeight(HeldWeight):
    """A float32 weight (N, K) on a CPU in oneDNN's layout, see `HeldWeight`; a copy or a pickle of it is None."""

    done, scope = "laid out for oneDNN", "the scope of prepack"

    def pack(self, backward: bool) -> Tensor:
        """W or W^T in oneDNN's layout, which only oneDNN's own products read."""
        weight = self.weight.detach()
        return torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous() if backward else weight.contiguous())

    def __deepcopy__(self, memo: dict) -> None:
        # a copied model may outlive the scope, and has weights of its own
        return None

    def __reduce__(self) -> tuple:
        # its number means nothing in another process
        return type(None), ()


def is_taken(x: Tensor, weight: PrepackedWeight, shift: Tensor | None = None) -> bool:
    """Whether `prepacked_linear` is to compute a product: on plain float32 numbers, and for nobody who records it.

    False too where the weight is seen to have changed, or its scope is over.
    """
    compiling = torch.compiler.is_compiling()
    # a program that is kept has no use for the number of a weight in this process
    if _is_transformed() or (torch.compiler.is_exporting() if compiling else _is_recorded() or not weight.is_open):
        return False
    N, K = weight.weight.shape
    if not _is_float32(x) or x.shape[-1:] != (K,) or autocast_is_on(x):
        return False
    if shift is not None and not (_is_float32(shift) and shift.shape == (N,)):
        return False
    return compiling or not weight.has_changed()


def _is_float32(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_nested
    return plain and x.dtype == torch.float32 and x.device.type == "cpu"


def _is_transformed() -> bool:
    """Whether a transform of functorch or forward derivatives are on: they pass an op by without a word."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_recorded() -> bool:
    """Whether a tracer or a counter is on: each knows plain products."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()


def prepacked_linear(x: Tensor, weight: PrepackedWeight, shift: Tensor | None = None) -> Tensor:
    """y = x W^T + c. x: (..., K) float32; shift: c (N,) or None, without a gradient. Returns (..., N) float32.

    Gradients flow to x, of any order. Nothing is saved for backward.
    """
    N, K = weight.weight.shape
    rows = x.reshape(-1, K)
    if torch.compiler.is_compiling():
        y = torch.ops.lofit.prepacked_product(rows, weight.key, shift, N, False)
    else:
        y = _Product.apply(rows, weight, shift, False)
    return y.view(*x.shape[:-1], N)


class _Product(torch.autograd.Function):
    """What the op does, for eager mode, where calling an op of Python's costs as much as a small product."""

    @staticmethod
    def forward(ctx, x, weight, shift, backward):
        """x (T, K) W^T + shift; with backward x (T, N) W."""
        ctx.weight, ctx.other_way = weight, not backward
        return _multiplied(x, weight, shift, backward)

    @staticmethod
    def backward(ctx, grad):
        """The gradient of x: the same with the other layout."""
        multiply = _Product.apply if torch.is_grad_enabled() else _multiplied
        return multiply(grad, ctx.weight, None, ctx.other_way), None, None, None


def _multiplied(x: Tensor, weight: PrepackedWeight, shift: Tensor | None, backward: bool) -> Tensor:
    packed = weight.packed(backward)
    if not len(x):
        return x.new_empty(0, weight.weight.shape[backward])
    # it reads a shift as if it lay in one piece
    shift = None if shift is None else shift.contiguous()
    return as_written(x, torch.ops.mkldnn._linear_pointwise, x.contiguous(), packed, shift, "none", [], "")


_library = torch.library.Library("lofit", "FRAGMENT")
_library.define("prepacked_product(Tensor x, Tensor key, Tensor? shift, int outputs, bool backward) -> Tensor")


def _prepacked_product(x: Tensor, key: Tensor, shift: Tensor | None, outputs: int, backward: bool) -> Tensor:
    return _multiplied(x, held_weight(key), shift, backward)


def _prepacked_product_fake(x: Tensor, key: Tensor, shift: Tensor | None, outputs: int, backward: bool) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    x, key, _, _, backward = inputs
    ctx.save_for_backward(key)
    ctx.inputs, ctx.other_way = x.shape[1], not backward


def _prepacked_product_backward(ctx, grad: Tensor) -> tuple:
    (key,) = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lofit.prepacked_product(grad, key, None, ctx.inputs, ctx.other_way)
    return dx, None, None, None, None


_library.impl("prepacked_product", _prepacked_product, "CPU")
torch.library.register_fake("lofit::prepacked_product", _prepacked_product_fake, lib=_library)
torch.library.register_autograd(
    "lofit::prepacked_product", _prepacked_product_backward, setup_context=_remember, lib=_library
)


@cache
def refusal() -> str | None:
    """Why this machine has no such products, or computes wrong ones; None where it has."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"they are known on x86 processors alone, got {platform.machine()}"
    if not torch.backends.mkldnn.is_available():
        return "they are oneDNN's, which this torch has been built without"
    # whatever the defaults of dtype and device are
    how = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    weight = nn.Parameter(torch.randn(37, 53, **how), requires_grad=False)
    x, grad = (torch.randn(19, size, **how) for size in (53, 37))
    held = PrepackedWeight(weight)
    try:
        got = [
            torch.ops.lofit.prepacked_product(rows, held.key, None, size, backward).double()
            for rows, size, backward in ((x, 37, False), (grad, 53, True))
        ]
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"oneDNN failed: {str(error).splitlines()[0]}"
    finally:
        held.close()
    exact = [x.double() @ weight.double().t(), grad.double() @ weight.double()]
    wrong = max((one - other).abs().max().item() for one, other in zip(got, exact, strict=True))
    # 53 products of numbers of size one, added in float32
    return None if wrong < 1e-4 else f"oneDNN computes a wrong product: an error of {wrong:.3g}"
