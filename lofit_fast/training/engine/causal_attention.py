"""Attention for accelerators: torch's fused causal kernels on batches that are padded on the right, without a mask.

A token never looks to its right, and there padding is: a causal mask keeps it out of every result already. So the
padding needs no mask of its own, no device has to be asked whether there is any, and torch may take the kernels that
know `is_causal` alone. What else a layer masks (windows, chunks, blocks) is masked as transformers masks it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Token

import torch
from torch import Tensor, nn

from lofit_fast.data.collate import KEPT_ROWS
from lofit_fast.data.padding import PADDED_RIGHT
from lofit_fast.models.prompt_states import PROMPTS
from lofit_fast.patching.cache_names import given_cache

CAUSAL = "lofit_causal"
# the largest head that kernels with shared keys take; others would write out all scores
_WIDEST_SHARED = 256
# what says that a batch is a collator's, which pads on the right: all names of one of these, and others bring no such
_MARKS = ((KEPT_ROWS,), ("logits_to_keep", "shift_labels"))


def register() -> None:
    """Make CAUSAL a name that transformers knows, as it knows "eager" and "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(CAUSAL, causal_attention)
    AttentionMaskInterface.register(CAUSAL, causal_mask)


@contextmanager
def marked_batches(model: nn.Module) -> Iterator[None]:
    """A scope in which a batch of our collators is known as padded on the right by what it brings.

    model: what is called with the batches. Any other call, as of `generate` with its padding on the left, is masked.
    """
    entered = _Entered()

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        marked = any(all(kwargs.get(name) is not None for name in names) for names in _MARKS)
        # prompts that are given as keys and values are padded on the left
        marked = marked and PROMPTS not in kwargs and given_cache(kwargs) is None
        entered.tokens.append(PADDED_RIGHT.set(PADDED_RIGHT.get() or marked))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        if entered.tokens:
            PADDED_RIGHT.reset(entered.tokens.pop())

    hooks = [
        model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        # what a keyboard's interrupt has ended runs no hooks
        while entered.tokens:
            leave(model, (), None)


class _Entered(threading.local):
    """What undoes the marks of the calls that are going on, of each thread by itself."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []


def causal_mask(attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options) -> Tensor | None:
    """transformers' mask for sdpa, without the padding where that is on the right and the layer's mask is causal.

    attention_mask: (B, S) bool. Returns None where the causal mask is all there is, or (B, 1, S, S) bool.
    """
    from transformers.masking_utils import sdpa_mask

    if allow_is_causal_skip and PADDED_RIGHT.get():
        attention_mask = None
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options)


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v, by torch's scaled_dot_product_attention.

    query: (B, H, S, D). key, value: (B, G, S, D), H a multiple of G, all of one floating dtype. attention_mask: bool,
    broadcast to (B, H, S, S), or None for a causal one where the module is causal. scaling: D^-0.5 unless given.
    Returns (B, S, H, D), and None for the weights. Signature and shapes are those of transformers' AttentionInterface.
    Raises ValueError for what torch's kernels do not know: scores that are capped, sinks and biases by position.
    """
    unknown = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
    if named := [name for name, given in unknown.items() if given is not None]:
        raise ValueError(f"{type(module).__name__} asks for {named[0]}, which {CAUSAL} attention does not have")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        # the last of a row (Gemma 4's, asked for a few logits): torch would take them for its first
        attention_mask = _of_the_last(query, key)
    groups, widths = query.shape[1] // key.shape[1], (query.shape[-1], value.shape[-1])
    fused = groups > 1 and shares_keys(query.dtype, *widths, attention_mask is not None)
    shared = fused and _flash_runs_on(query.device)
    if groups > 1 and not shared:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        # a compiler's symbol of a length must be asked first
        is_causal=query.shape[2] > 1 and attention_mask is None and bool(causal),
        scale=scaling,
        enable_gqa=shared,
    )
    return mixed.transpose(1, 2).contiguous(), None


def _of_the_last(query: Tensor, key: Tensor) -> Tensor:
    """(Q, S) bool: what the last Q tokens of a row look at."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


def _flash_runs_on(device: torch.device) -> bool:
    """Whether torch's flash attention runs on a device; not on CUDA's before compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def shares_keys(dtype: torch.dtype, query_width: int, value_width: int, masked: bool) -> bool:
    """Whether torch has a fused kernel for several query heads on one of keys: flash attention's, in 16 bits.

    Where it has none, it would write out all scores; with repeated keys the memory-efficient kernel does not.
    """
    in_16_bits = dtype in (torch.float16, torch.bfloat16)
    return in_16_bits and not masked and query_width == value_width <= _WIDEST_SHARED
