"""Which positions of a forward are the first and last of the prompts: read off what the model is called with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lofit_fast.data.encode import IGNORED
from lofit_fast.patching.cache_names import given_cache

_PACKED = "prompts cannot be told apart in a packed row: train without packing"


class PromptEdges:
    """mask: of the forward that runs, (B, S) bool, true at every prompt's first `first` and last `last` tokens.

    None where the forward holds no prompt: keys and values of an earlier one are given, so these are generated tokens.
    A hook on the model's own call fills it.
    """

    def __init__(self, model: nn.Module, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.mask: Tensor | None = None
        self._hook = model.register_forward_pre_hook(self._read, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook out."""
        self._hook.remove()

    def _read(self, model: nn.Module, args: tuple, given: dict) -> None:
        self.mask = prompt_edges({**given, **({"input_ids": args[0]} if args else {})}, self.first, self.last)


def prompt_edges(given: dict, first: int, last: int) -> Tensor | None:
    """`PromptEdges.mask` from the model's arguments.

    A prompt ends with the token whose next one is labelled, or else at the first position whose logits are asked for
    (logits_to_keep), or else with its row; padding on either side does not count.
    Raises ValueError for a packed row, in which prompts cannot be told apart.
    """
    cache = given_cache(given)
    if cache is not None and int(cache.get_seq_length()) > 0:
        return None
    ids = given.get("input_ids")
    tokens = given["inputs_embeds"][..., 0] if ids is None else ids
    if given.get("packed_rows") is not None:
        raise ValueError(_PACKED)
    real, mask = torch.ones_like(tokens, dtype=torch.bool), given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.bool()
    elif given.get("position_ids") is not None and (given["position_ids"].diff(dim=-1) < 0).any():
        raise ValueError(_PACKED)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    prompt = real & (position < _ends(given, tokens)[:, None])
    rank, length = prompt.cumsum(1), prompt.sum(1, keepdim=True)
    return prompt & ((rank <= first) | (rank > length - last))


def _ends(given: dict, tokens: Tensor) -> Tensor:
    """(B,): the position after each prompt's last."""
    rows, width = tokens.shape
    labels, keep = given.get("labels"), given.get("logits_to_keep")
    whole = torch.full((rows,), width, device=tokens.device)
    if labels is not None:
        labelled = labels != IGNORED
        return torch.where(labelled.any(1), labelled.int().argmax(1), whole)
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        return torch.where(keep.any(1), keep.int().argmax(1) + 1, whole)
    if isinstance(keep, Tensor):
        return whole.clamp(max=int(keep.min()) + 1)
    return whole - keep + 1 if keep else whole
