"""Attention for CPUs: in training plain products, with nothing expanded and only queries, keys and values kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lofit_fast.cpu.packed_rows import gather, spread
from lofit_fast.data.pack import GROUPED

# where no gradient is wanted, the fused kernel wins from so many queries on: 8 times at 700 x 700, and without scores
_FUSED_FROM = 16


def register() -> None:
    """Make GROUPED a name that transformers knows, as it knows "eager" and "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, grouped_mask)


def grouped_mask(batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options):
    """transformers' mask for eager attention, of the padded rows where a batch is packed.

    A batch is packed where its attention_mask (B, T) has another number of rows than its tokens: the mask is then
    (B, 1, T, T), whatever the layer's kind of mask allows in a row that is not packed.
    """
    from transformers.masking_utils import eager_mask

    if attention_mask is not None and len(attention_mask) != batch_size:
        batch_size, q_length = attention_mask.shape
        kv_length = q_length
    return eager_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options
    )


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_rows: Tensor | None = None,
    packed_places: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v, with one product for all query heads that share their keys.

    query: (B, H, Q, D). key: (B, G, K, D). value: (B, G, K, V), H a multiple of G; all of one floating dtype.
    attention_mask: added to the scores, broadcast to (B, H, Q, K). scaling: D^-0.5 unless given. softcap: scores s
    become softcap tanh(s / softcap) before the mask (arXiv:2408.00118). dropout: of the weights, while the module
    trains. s_aux: (H,), sinks: the score of one more key of each head, whose value is zero (arXiv:2309.17453).
    packed_rows, packed_places: `rows` and `places` of a packed row (packed_rows.py). The others are then (1, ., N, D),
    the mask that of the padded rows, and so is the result's B = 1, Q = N.
    Returns (B, Q, H, V), and None for the weights: the backward pass computes them again, one product of six more,
    so that no (B, H, Q, K) tensor is kept. Many queries without a gradient, as of a prompt, go to torch's fused kernel.
    Signature and shapes are those of transformers' AttentionInterface.
    Raises ValueError for query heads that cannot share the heads of keys and values.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{type(module).__name__} has {query.shape[1]} query heads on {key.shape[1]} heads of keys and values: "
            f"expected a multiple of {key.shape[1]}"
        )
    tokens = query.shape[2]
    if packed_rows is not None:
        query, key, value = (spread(each, packed_rows, packed_places) for each in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    arguments = query, key, value, attention_mask, scaling, dropout, softcap, s_aux
    learned = [each for each in (query, key, value, s_aux) if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in learned):
        # weights of a few tokens behind a long prompt are fewer numbers than its keys: cheaper kept than made again
        few = query.shape[2] < key.shape[2] and query.shape[1] * query.shape[2] <= key.shape[1] * key.shape[3]
        mixed = (_attend if few else _attend_again)(*arguments)
    elif query.shape[2] < _FUSED_FROM or softcap is not None or s_aux is not None:
        mixed = _attend(*arguments)
    else:
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
        )
    if packed_rows is not None:
        return gather(mixed, packed_rows, packed_places, tokens), None
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
    sinks: Tensor | None,
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
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat((scores, sink), -1)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide)[..., :keys].to(query.dtype)
    return nn.functional.dropout(weights, dropout)


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """(B, H, Q, D): the values by their weights."""
    batch, heads, length, keys = weights.shape
    groups = value.shape[1]
    rows = weights.reshape(batch * groups, heads // groups * length, keys)
    return torch.bmm(rows, value.reshape(-1, keys, value.shape[-1])).view(batch, heads, length, -1)
