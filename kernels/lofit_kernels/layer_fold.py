"""The fold of the same layers, step after step, for a model that runs their projections next.

What `fold_offsets` and `head_affine_linear` look at in every call is looked at once here, and again when a tensor has
moved. Not for torch.compile, which looks at nothing twice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lofit_kernels import ops, usual_projections
from lofit_kernels.dispatch import plan_on
from lofit_kernels.eager_scopes import autocast_is_on
from lofit_kernels.functional import fold_offsets, head_affine_linear
from lofit_kernels.projection import primitives

# (weight, offset, heads) as `fold_offsets` takes them
Layer = tuple[Tensor, Tensor, Tensor]


class Folded(NamedTuple):
    """W v of one layer, ready for `folded_linear`: exact (N,) with its graph, rounded to the dtype of weight (N, K)."""

    weight: Tensor
    exact: Tensor
    rounded: Tensor
    backend: str


class LayerFold:
    """`fold_offsets` for whatever layers it is given, prepared for the same ones to be given again."""

    def __init__(self) -> None:
        # one value, since two threads may run a model: what is read is of one call
        self._known = _Known([], "", None)

    def __reduce__(self) -> tuple:
        # a copy's tensors are elsewhere
        return LayerFold, ()

    def __call__(self, layers: Sequence[Layer]) -> list[Folded]:
        """W v of every layer. Raises as `fold_offsets` does."""
        weights, offsets, heads = zip(*layers, strict=True)
        state = [_state(*layer) for layer in layers]
        known = self._known
        if state == known.state and known.backend:
            exact = ops.GroupedFold.apply((weights, heads, known.backend, known.table), *offsets)
        else:
            exact = fold_offsets(weights, offsets, heads)
            known = self._known = _known(layers, state)
        if not known.backend:
            rounded = [x.detach().to(weight.dtype) for x, weight in zip(exact, weights, strict=True)]
            backends = [plan_on(weight.device, weight.dtype, "auto").backend for weight in weights]
            return [Folded(*of) for of in zip(weights, exact, rounded, backends, strict=True)]
        rounded, dtype = exact, weights[0].dtype
        if dtype != exact[0].dtype:
            # one cast for all of them
            with torch.no_grad():
                rounded = torch.stack(exact).to(dtype).unbind()
        return [Folded(weight, x, r, known.backend) for weight, x, r in zip(weights, exact, rounded, strict=True)]


class _Known(NamedTuple):
    """What a call need not look at again. state: all that the answer depends on but the numbers themselves. backend,
    table: as `ops.GroupedFold` takes them; "" and None of layers of several kinds, or that the kernels cannot read."""

    state: list[tuple]
    backend: str
    table: Any


def _known(layers: Sequence[Layer], state: list[tuple]) -> _Known:
    first, offset, _ = layers[0]
    kind = (first.shape[0], first.dtype, first.device, offset.shape[1])
    if any((w.shape[0], w.dtype, w.device, o.shape[1]) != kind or not o.is_contiguous() for w, o, _ in layers):
        return _Known(state, "", None)
    backend, table = plan_on(first.device, first.dtype, "auto").backend, None
    if backend == "triton":
        if any(w.stride(1) != 1 or w.stride(0) >= 2**31 for w, _, _ in layers):
            return _Known(state, "", None)
        table = primitives(backend).layer_table(*zip(*layers, strict=True))
    return _Known(state, backend, table)


def _state(weight: Tensor, offset: Tensor, heads: Tensor) -> tuple:
    """Where the tensors of a layer are, how they lie there, and whether `fold_offsets` refuses the weight."""
    w, v = (weight.data_ptr(), weight.stride(), weight.shape), (offset.data_ptr(), offset.stride(), offset.shape)
    trained = weight.requires_grad and torch.is_grad_enabled()
    return w, weight.dtype, trained, v, offset.dtype, heads.data_ptr(), heads.shape


def folded_linear(z: Tensor, folded: Folded) -> Tensor:
    """z W^T + W v with the offset's gradient through `folded.exact`: (..., N) for z (..., K), as `head_affine_linear`.

    For projections without a bias or a scale. What `LayerFold` has checked is not checked again.
    """
    weight, exact, rounded, backend = folded
    # a compiled layer of a model that was folded in eager mode gets here, too
    if torch.compiler.is_dynamo_compiling():
        return head_affine_linear(z, weight, folded=exact)
    if z.dtype != weight.dtype or z.shape[-1] != weight.shape[1] or autocast_is_on(z):
        return head_affine_linear(z, weight, folded=exact)
    return usual_projections.folded_projection(z, exact, weight, (rounded, backend))
