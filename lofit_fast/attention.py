"""Attention for CPUs: in training plain products, with nothing expanded and only queries, keys and values kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GROUPED = "lofit_grouped"
# where no gradient is wanted, the fused kernel wins from so many queries on: 8 times at 700 x 700, and without scores
_FUSED_FROM = 16


def register() -> None:
    """Make GROUPED a name that transformers knows, as it knows "eager" and "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, eager_mask)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v, with one product for all query heads that share their keys.

    query: (B, H, Q, D). key, value: (B, G, K, D), H a multiple of G; all of one floating dtype. attention_mask: added
    to the scores, broadcast to (B, H, Q, K). scaling: D^-0.5 unless given. softcap: scores s become
    softcap tanh(s / softcap) before the mask (arXiv:2408.00118). dropout: of the weights, while the module trains.
    Returns (B, Q, H, D), and None for the weights: the backward pass computes them again, one product of six more,
    so that no (B, H, Q, K) tensor is kept. Many queries without a gradient, as of a prompt, go to torch's fused kernel.
    Signature and shapes are those of transformers' AttentionInterface.
    Raises ValueError for attention sinks.
    """
    if options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which attention {GROUPED!r} does not know")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    arguments = query, key, value, attention_mask, scaling, dropout, softcap
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        mixed = _attend_again(*arguments)
    elif query.shape[2] < _FUSED_FROM or softcap is not None:
        mixed = _attend(*arguments)
    else:
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
        )
    return mixed.transpose(1, 2).contiguous(), None


def _attend_again(query: Tensor, key: Tensor, value: Tensor, *options) -> Tensor:
    """`_attend`, whose weights the backward pass computes again."""
    if not torch.compiler.is_compiling():
        return checkpoint(_attend, query, key, value, *options, use_reentrant=False)
    # a compiler would make the result again too, for the gradient of scales; uncompiled, weights in between are kept
    return _mix(checkpoint(_weights, query, key, *options, use_reentrant=False), value)


def _attend(query: Tensor, key: Tensor, value: Tensor, *options) -> Tensor:
    return _mix(_weights(query, key, *options), value)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """(B, H, Q, K)."""
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    rows = batch * groups, heads // groups * length
    products = torch.bmm(query.reshape(*rows, width), key.reshape(-1, keys, width).transpose(1, 2))
    scores = products.view(batch, heads, length, keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    return nn.functional.dropout(weights, dropout)


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """(B, H, Q, D): the values by their weights."""
    batch, heads, length, keys = weights.shape
    groups = value.shape[1]
    rows = weights.reshape(batch * groups, heads // groups * length, keys)
    return torch.bmm(rows, value.reshape(-1, keys, value.shape[-1])).view(batch, heads, length, -1)
