"""The two projections that a training runs most, as autograd nodes of their own: a fold, and a scale without an offset.

Of a frozen weight without a bias, by the vendor's products. `ops.AffineLinear` computes the same, and everything else,
from arguments that it has to take apart first; on the host that takes longer than the nodes themselves.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels.eager_scopes import autocast_is_on, once
from lofit_kernels.projection import primitives


class FoldedLinear(torch.autograd.Function):
    """z W^T + c, the usual case of `AffineLinear` in the step that tunes offsets: dz = dY W, dc = sum_t dY."""

    @staticmethod
    def forward(ctx, z, folded, weight, rest):
        """y (..., N). folded: (N,) float32, float64 beside a float64 z. weight: frozen, an input so that autograd sees
        it, and refuses derivatives that there are none of. rest: folded in z's dtype, backend."""
        rounded, ctx.backend = rest
        ctx.save_for_backward(weight)
        if z.is_contiguous() and z.dim() == 3:
            # one matrix product, as of two dimensions
            return linear(z, weight, rounded)
        y = linear(z.reshape(-1, z.shape[-1]), weight, rounded)
        return y.view(*z.shape[:-1], y.shape[-1])

    @staticmethod
    @once
    def backward(ctx, grad):
        """The gradients of z and folded that are needed."""
        (weight,), (needs_z, needs_folded, _, _) = ctx.saved_tensors, ctx.needs_input_grad
        if autocast_is_on(grad):
            with torch.autocast(grad.device.type, enabled=False):
                return _folded_gradients(grad, weight, ctx.backend, needs_z, needs_folded)
        return _folded_gradients(grad, weight, ctx.backend, needs_z, needs_folded)


def _folded_gradients(grad, weight, backend, needs_z, needs_folded) -> tuple[Tensor | None, ...]:
    rows = grad.reshape(-1, grad.shape[-1])
    total = primitives(backend).column_sum(rows) if needs_folded else None
    dz = torch.mm(rows, weight).view(*grad.shape[:-1], weight.shape[1]) if needs_z else None
    return dz, total, None, None


def _applied(function: type[torch.autograd.Function]) -> Callable:
    """function.apply, without what torch does for functorch's transforms and older forms of a Function, a tenth of a
    projection's time on the host. function.apply itself on a torch that has other names for the parts of it."""
    plain = getattr(super(torch.autograd.Function, function), "apply", None)
    transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
    if plain is None or transformed is None:
        return function.apply

    def apply(*args):
        # they refuse such a Function, and say so
        return function.apply(*args) if transformed() else plain(*args)

    return apply


folded_projection = _applied(FoldedLinear)


class PassLinear(torch.autograd.Function):
    """((1 + a) z) W^T, the usual case of `AffineLinear` in the step that scores heads.

    dz = (1 + a) G, da = sum_t G z, with G = dY W.
    """

    @staticmethod
    def forward(ctx, z, scale, weight, rest):
        """y (..., N). scale: (h, D) float32, float64 beside a float64 z. weight: (N, K), as in `FoldedLinear`.
        rest: heads, backend."""
        ctx.heads, ctx.backend = rest
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, scale, weight)
        rows, D = z.reshape(-1, z.shape[-1]), scale.shape[1]
        y = linear(primitives(ctx.backend).affine_fwd(rows, scale, ctx.heads, None, None, D), weight)
        return y.view(*z.shape[:-1], y.shape[-1])

    @staticmethod
    @once
    def backward(ctx, grad):
        """The gradients of z and scale that are needed."""
        if autocast_is_on(grad):
            with torch.autocast(grad.device.type, enabled=False):
                return _pass_gradients(grad, *ctx.saved_tensors, ctx.heads, ctx.backend, ctx.needs_input_grad)
        return _pass_gradients(grad, *ctx.saved_tensors, ctx.heads, ctx.backend, ctx.needs_input_grad)


pass_projection = _applied(PassLinear)


def _pass_gradients(grad, z, scale, weight, heads, backend, needs) -> tuple[Tensor | None, ...]:
    rows = None if z is None else z.reshape(-1, z.shape[-1])
    g = torch.mm(grad.reshape(-1, grad.shape[-1]), weight)
    wanted = (needs[0], needs[1], False)
    # g is a temporary of this call, so that untouched heads cost nothing
    dz, da, _ = primitives(backend).affine_bwd(g, rows, scale, heads, None, scale.shape[1], wanted, inplace=True)
    return dz.view(*grad.shape[:-1], weight.shape[1]) if needs[0] else None, da, None, None
