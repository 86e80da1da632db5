"""The definition of the op in plain PyTorch, with its closed-form backward: the oracle of every other path.

Letters as everywhere in the project: T tokens, H heads, D head_dim, K = H * D, N hidden size.
Everything is computed in the widest dtype among the inputs and float32, and rounded once at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of one projection, each of its input's shape; None where the input was None."""

    z: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    offset: Tensor | None


def _dense(vectors: Tensor | None, heads: Tensor | None, like: Tensor, head_dim: int) -> Tensor:
    """Rows (h, D) placed at their heads in a zero vector (K,)."""
    dense = torch.zeros(like.shape[-1], dtype=_wide(like), device=like.device)
    if vectors is not None:
        dense.view(-1, head_dim)[heads] = vectors.to(dense.dtype)
    return dense


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _head_dim(scale: Tensor | None, offset: Tensor | None) -> int:
    return (scale if scale is not None else offset).shape[1]


def affine(
    z: Tensor,
    scale: Tensor | None = None,
    scale_heads: Tensor | None = None,
    offset: Tensor | None = None,
    offset_heads: Tensor | None = None,
) -> Tensor:
    """(1 + a) * z + v on the selected heads.

    z: (..., K); scale, offset: (h, D) or None; heads: (h,) int64. Returns z's shape and dtype.
    """
    if scale is None and offset is None:
        return z
    head_dim = _head_dim(scale, offset)
    a, v = _dense(scale, scale_heads, z, head_dim), _dense(offset, offset_heads, z, head_dim)
    return ((1 + a) * z.to(_wide(z)) + v).to(z.dtype)


def affine_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    scale_heads: Tensor | None = None,
    offset: Tensor | None = None,
    offset_heads: Tensor | None = None,
) -> Tensor:
    """((1 + a) * z + v) W^T + b, rounded once.

    z: (..., K); weight: (N, K); bias: (N,) or None; the rest as in `affine`. Returns (..., N) in z's dtype.
    """
    wide = _wide(z)
    x = affine(z.to(wide), scale, scale_heads, offset, offset_heads)
    y = x @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(z.dtype)


def affine_linear_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    scale_heads: Tensor | None = None,
    offset: Tensor | None = None,
    offset_heads: Tensor | None = None,
) -> Gradients:
    """G = dY W;  dz = (1 + a) G;  da = sum_t G * z;  dv = sum_t G;  dW = dY^T x;  db = sum_t dY.

    grad: (..., N), the gradient of `affine_linear`'s output; the rest as there.
    """
    wide = _wide(z)
    dy, zw = grad.reshape(-1, grad.shape[-1]).to(wide), z.reshape(-1, z.shape[-1]).to(wide)
    g = dy @ weight.to(wide)
    head_dim = _head_dim(scale, offset) if scale is not None or offset is not None else 1
    a = _dense(scale, scale_heads, z, head_dim)
    by_head = (-1, head_dim)
    return Gradients(
        z=((1 + a) * g).to(z.dtype).view(z.shape),
        weight=(dy.T @ affine(zw, scale, scale_heads, offset, offset_heads)).to(weight.dtype),
        bias=None if bias is None else dy.sum(0).to(bias.dtype),
        scale=None if scale is None else (g * zw).sum(0).view(by_head)[scale_heads].to(scale.dtype),
        offset=None if offset is None else g.sum(0).view(by_head)[offset_heads].to(offset.dtype),
    )
