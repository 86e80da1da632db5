"""The op twice: as torch.library custom ops for torch.compile, and as an autograd.Function for eager mode.

`lofit::affine_linear` is the projection with the adapter inside; `lofit::affine` is the adapter alone, for base layers
that must not be bypassed; `lofit::grouped_fold` is W v of many layers at once. Each has a fake and a backward op of its
own, so that a compiled backward stays one node.
The Functions call the same code without the dispatcher's wrappers, which cost more than a small projection.
Differentiating twice raises, either way, instead of returning something wrong.
"""

import torch
from torch import Tensor

from lofit_kernels.answers import Path
from lofit_kernels.dispatch import NUMBERED_PATHS, added, plan_for
from lofit_kernels.eager_scopes import as_written, once
from lofit_kernels.op_arguments import Arguments
from lofit_kernels.projection import affine_linear_bwd, affine_linear_fwd, primitives
from lofit_kernels.usual_projections import folded_projection, pass_projection


@torch.library.custom_op("lofit::affine_linear", mutates_args=())
def affine_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    folded: Tensor | None,
    form: str,
    backend: str,
    gemm: str = "auto",
) -> tuple[Tensor, int]:
    """(y, the number of its path): the flat form of `Arguments`, all of them as there.

    With folded the gradient is its own, and the offset gets none. A part of the path that is "auto" is chosen here,
    where the number of tokens is a number even in a graph compiled for any; the path's number in `NUMBERED_PATHS` is an
    output, so that the backward pass takes the same one.
    """
    flat = (z, weight, bias, scale, scale_heads, offset, offset_heads, folded, form, backend, gemm)
    arguments = Arguments.rebuilt(flat)
    path = plan_for(z.shape[:-1].numel(), weight, scale, *arguments.path, *added(bias, offset, folded)).path
    return as_written(z, affine_linear_fwd, arguments._replace(path=path)), NUMBERED_PATHS.index(path)


@affine_linear.register_fake
def _(z, weight, bias, scale, scale_heads, offset, offset_heads, folded, form, backend, gemm="auto"):
    alone = "dither" if form == "dither" and (offset is not None or folded is not None) else "fold"
    path = Path(alone, backend, "vendor") if scale is None else Path(form, backend, gemm)
    # a number that only the run tells keeps Inductor from using CUDA graphs: none where nothing is left to choose
    number = torch.library.get_ctx().new_dynamic_size() if "auto" in path else NUMBERED_PATHS.index(path)
    return z.new_empty(*z.shape[:-1], weight.shape[0]), number


@torch.library.custom_op("lofit::affine_linear_backward", mutates_args=())
def affine_linear_backward(
    grad: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    needs: list[bool],
    path: int,
) -> list[Tensor]:
    """The gradients of (z, weight, bias, scale, offset, folded) that `needs` asks for, in that order, others left out.

    path: the number that the forward op gave. The gradient of folded is sum_t dY in float32 (float64 for float64), the
    dtype that folded has.
    """
    saved = (z, weight, bias, scale, scale_heads, offset, offset_heads)
    grads = _linear_backward(grad, Arguments.of_saved(saved, NUMBERED_PATHS[path]), needs)
    return [g for g in grads if g is not None]


def _linear_backward(grad: Tensor, arguments: Arguments, needs: list[bool]) -> list[Tensor | None]:
    """The gradients of (z, weight, bias, scale, offset, folded) in their inputs' dtypes, None where not needed."""
    needs_z, needs_weight, needs_bias, needs_scale, needs_offset, needs_folded = needs
    inner = (needs_z, needs_weight, needs_bias or needs_folded, needs_scale, needs_offset)
    d_z, d_weight, total, d_scale, d_offset = as_written(grad, affine_linear_bwd, grad, arguments, inner)
    # both are sum_t dY, and results of a custom operator must not share storage
    d_bias = total.clone() if needs_bias and needs_folded else total if needs_bias else None
    found = (d_z, d_weight, d_bias, d_scale, d_offset)
    likes = (grad, arguments.weight, arguments.bias, arguments.scale, arguments.offset)
    cast = [g if g is None or g.dtype == like.dtype else g.to(like.dtype) for g, like in zip(found, likes, strict=True)]
    return [*cast, total if needs_folded else None]


@affine_linear_backward.register_fake
def _(grad, z, weight, bias, scale, scale_heads, offset, offset_heads, needs, path):
    d_z = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if needs[0] else None
    # contiguous, however the inputs lie
    rest = (None if x is None else x.new_empty(x.shape) for x in (weight, bias, scale, offset))
    wide = torch.promote_types(grad.dtype, torch.float32)
    rest = (*rest, grad.new_empty(weight.shape[0], dtype=wide) if needs[5] else None)
    return [g for g, needed in zip((d_z, *rest), needs, strict=True) if needed]


def _save_linear(ctx, arguments: Arguments) -> None:
    """Keeps what the backward pass reads; z only for the gradients of weight and scale."""
    asked = ctx.needs_input_grad
    ctx.needs = Arguments.needed(asked, arguments.folded is not None)
    ctx.save_for_backward(*arguments.saved(keep_z=ctx.needs[1] or ctx.needs[3]))


def _setup_linear(ctx, inputs, output):
    _save_linear(ctx, Arguments.rebuilt(inputs))
    ctx.path = output[1]


def _linear_gradients(ctx, grad, _):
    found = iter(affine_linear_backward(grad, *ctx.saved_tensors, ctx.needs, ctx.path))
    return *Arguments.placed([next(found) if needed else None for needed in ctx.needs]), None, None, None


affine_linear.register_autograd(_linear_gradients, setup_context=_setup_linear)


def eager_affine_linear(arguments: Arguments) -> Tensor:
    """`lofit::affine_linear` for eager mode, of arguments whose path leaves nothing to choose, outside of autocast."""
    z, weight, bias, scale, heads, offset, _, folded, (form, backend, gemm) = arguments
    if bias is None and not weight.requires_grad and gemm == "vendor":
        if form == "fold" and folded is not None:
            return folded_projection(z, folded, weight, (folded.to(z.dtype), backend))
        if form == "pass" and offset is None and folded is None:
            return pass_projection(z, scale, weight, (heads, backend))
    return AffineLinear.apply(arguments, *arguments.given())


class AffineLinear(torch.autograd.Function):
    """`lofit::affine_linear` for eager mode, of arguments whose path leaves nothing to choose.

    apply(arguments, *arguments.given()): autograd follows those tensors, which the arguments hold, too.
    """

    @staticmethod
    def forward(ctx, arguments, *given):
        """y (..., N)."""
        asked = iter(ctx.needs_input_grad[1:])
        leaves = arguments.leaves()
        ctx.given = [x is not None for x in leaves]
        needs = [there and next(asked) for there in ctx.given]
        # y depends on folded alone where that is given
        needs[4] = needs[4] and arguments.folded is None
        ctx.needs, ctx.path = needs, arguments.path
        ctx.save_for_backward(*arguments.saved(keep_z=needs[1] or needs[3]))
        return affine_linear_fwd(arguments)

    @staticmethod
    @once
    def backward(ctx, grad):
        """The gradients that are needed, by the path of the forward pass; see `affine_linear_backward`."""
        found = _linear_backward(grad, Arguments.of_saved(ctx.saved_tensors, ctx.path), ctx.needs)
        return None, *[g for g, there in zip(found, ctx.given, strict=True) if there]


@torch.library.custom_op("lofit::grouped_fold", mutates_args=())
def grouped_fold(weights: list[Tensor], offsets: list[Tensor], heads: list[Tensor], backend: str) -> Tensor:
    """W_S v_S of L layers of one N and D, as (L, N).

    Of each layer: weights (N, K); offsets (h, D) float32; heads (h,) int64.
    """
    return torch.stack(as_written(weights[0], primitives(backend).grouped_fold, weights, offsets, heads))


@grouped_fold.register_fake
def _(weights, offsets, heads, backend):
    return offsets[0].new_empty(len(weights), weights[0].shape[0])


@torch.library.custom_op("lofit::grouped_fold_backward", mutates_args=())
def grouped_fold_backward(
    grad: Tensor, weights: list[Tensor], heads: list[Tensor], head_dim: int, backend: str
) -> list[Tensor]:
    """dv of L layers: (h, head_dim) each. grad: (L, N), the column sums of dY."""
    found = as_written(grad, primitives(backend).grouped_bwd, grad.unbind(), weights, heads, head_dim)
    return [dv.clone() for dv in found]


@grouped_fold_backward.register_fake
def _(grad, weights, heads, head_dim, backend):
    return [grad.new_empty(h.shape[0], head_dim) for h in heads]


def _save_grouped(ctx, inputs, output):
    weights, offsets, heads, backend = inputs
    ctx.layers, ctx.head_dim, ctx.backend = len(weights), offsets[0].shape[1], backend
    ctx.save_for_backward(*weights, *heads)


def _grouped_gradients(ctx, grad):
    weights, heads = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers :]
    found = grouped_fold_backward(grad, list(weights), list(heads), ctx.head_dim, ctx.backend)
    return [None] * ctx.layers, found, [None] * ctx.layers, None


grouped_fold.register_autograd(_grouped_gradients, setup_context=_save_grouped)


class GroupedFold(torch.autograd.Function):
    """`lofit::grouped_fold` for eager mode: (N,) for each layer, and a gradient for no layer that got none.

    The frozen weights stay on the node itself. As saved tensors, activation checkpointing would count them, whose
    second run of a layer folds for that layer alone and must save what the first run saved; and nested backwards of one
    checkpoint after the other would find them gone.
    """

    @staticmethod
    def forward(ctx, layers, *offsets):
        """W_S v_S of every layer. layers: their weights, their heads, the backend, and what
        `gpu.offset_grouped.layer_table` made of these very tensors, or None."""
        ctx.set_materialize_grads(False)
        weights, heads, backend, table = ctx.layers = layers
        ctx.head_dim = offsets[0].shape[1]
        return tuple(as_written(weights[0], primitives(backend).grouped_fold, weights, offsets, heads, table))

    @staticmethod
    @once
    def backward(ctx, *grads):
        """dv of every layer that got a gradient, computed together."""
        needed = ctx.needs_input_grad
        reached = [i for i, g in enumerate(grads) if g is not None and needed[i + 1]]
        if not reached:
            return None, *[None] * len(grads)
        rows, (weights, heads, backend, table) = grads, ctx.layers
        if len(reached) < len(grads):
            rows, weights, heads = ([of[i] for i in reached] for of in (grads, weights, heads))
            table = None
        bwd = primitives(backend).grouped_bwd
        computed = as_written(rows[0], bwd, rows, weights, heads, ctx.head_dim, table)
        if len(reached) == len(grads):
            return None, *computed
        found = dict(zip(reached, computed, strict=True))
        return None, *[found.get(i) for i in range(len(grads))]


@torch.library.custom_op("lofit::affine", mutates_args=())
def affine(
    z: Tensor,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    backend: str,
) -> Tensor:
    """(1 + a) * z + v. z: (..., K); scale, offset: (h, D) float32; heads: (h,) int64. Returns z's shape and dtype."""
    return _affine_forward(z, scale, scale_heads, offset, offset_heads, backend)


def _affine_forward(z, scale, scale_heads, offset, offset_heads, backend):
    head_dim = (scale if scale is not None else offset).shape[1]
    rows = z.reshape(-1, z.shape[-1])
    vectors = (scale, scale_heads, offset, offset_heads)
    x = as_written(z, primitives(backend).affine_fwd, rows, *vectors, head_dim)
    # whatever z's strides, the fake promises contiguous
    return x.contiguous().view(z.shape)


@affine.register_fake
def _(z, scale, scale_heads, offset, offset_heads, backend):
    return z.new_empty(z.shape)


@torch.library.custom_op("lofit::affine_backward", mutates_args=())
def affine_backward(
    grad: Tensor,
    z: Tensor | None,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of (z, scale, offset) that `needs` asks for, in that order, the others left out."""
    grads = _affine_backward(grad, z, scale, scale_heads, offset, offset_heads, needs, backend)
    return [g for g in grads if g is not None]


def _affine_backward(grad, z, scale, scale_heads, offset, offset_heads, needs, backend):
    """The gradients of (z, scale, offset) in their inputs' dtypes, None where not needed."""
    head_dim = (scale if scale is not None else offset).shape[1]
    rows = None if z is None else z.reshape(-1, z.shape[-1])
    flat = grad.reshape(-1, grad.shape[-1])
    given = (flat, rows, scale, scale_heads, offset_heads, head_dim, tuple(needs))
    grads = as_written(grad, primitives(backend).affine_bwd, *given)
    shaped = (None if grads[0] is None else grads[0].contiguous().view(grad.shape), *grads[1:])
    return [None if g is None else g.to(x.dtype) for g, x in zip(shaped, (grad, scale, offset), strict=True)]


@affine_backward.register_fake
def _(grad, z, scale, scale_heads, offset, offset_heads, needs, backend):
    likes = (grad.new_empty(grad.shape), scale, offset)
    return [x.new_empty(x.shape) for x, needed in zip(likes, needs, strict=True) if needed]


def _save_affine(ctx, inputs, output):
    z, scale, scale_heads, offset, offset_heads, backend = inputs
    needs = ctx.needs_input_grad
    ctx.needs = [needs[0], needs[1], needs[3]]
    ctx.backend = backend
    ctx.save_for_backward(z if needs[1] else None, scale, scale_heads, offset, offset_heads)


def _affine_gradients(ctx, grad):
    found = iter(affine_backward(grad, *ctx.saved_tensors, ctx.needs, ctx.backend))
    d_z, d_scale, d_offset = (next(found) if needed else None for needed in ctx.needs)
    return d_z, d_scale, None, d_offset, None, None


affine.register_autograd(_affine_gradients, setup_context=_save_affine)


class Affine(torch.autograd.Function):
    """`lofit::affine` for eager mode; the same arguments."""

    @staticmethod
    def forward(ctx, *inputs):
        """(1 + a) * z + v; see `affine`."""
        _save_affine(ctx, inputs, None)
        return _affine_forward(*inputs)

    @staticmethod
    @once
    def backward(ctx, grad):
        """The gradients that are needed; see `affine_backward`."""
        d_z, d_scale, d_offset = _affine_backward(grad, *ctx.saved_tensors, ctx.needs, ctx.backend)
        return d_z, d_scale, None, d_offset, None, None
