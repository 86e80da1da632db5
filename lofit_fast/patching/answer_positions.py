"""Where an answer begins, read off what a model is called with; refused where that does not say it.

A vector with positions="answer" acts from the last token of the prompt on, whose output predicts the first token of the
answer. The functions here find that token of each row; `AnswerWatch` tells the layers of it before a forward runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lofit_fast.data.encode import IGNORED
from lofit_fast.patching.acting import EVERYWHERE, SAY_IT, UNKNOWN, Acting, Mask, said_for
from lofit_fast.patching.cache_names import given_cache, is_empty

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lofit_fast.patching.layer import LofitLinear
    from lofit_fast.patching.peft_layers import PeftWatch

_GENERATION = "transformers.generation.utils"
_GENERATING = ("_prefill", "_assisted_decoding", "_sample", "_beam_search")


class AnswerWatch:
    """Finds out before each forward of a patched model where its vectors act, and leaves that to the layers.

    Hooks on the model that is called with labels or a cache, and on its decoder, which may be called by itself in a
    scope of `handle.acting_on`. A layer that runs a second time finds the same mask: `checkpoints.ScopedCheckpoint`.

    model: the language model. decoder: the part of it that holds the layers. layers: ours, which share `acting`.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        layers: Sequence[LofitLinear],
        acting: Acting,
        peft_watch: PeftWatch,
    ) -> None:
        self.layers, self.acting, self.peft_watch = layers, acting, peft_watch
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        if decoder is not model:
            self._hooks += [
                decoder.register_forward_pre_hook(self._begin_within),
                decoder.register_forward_hook(self._end, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = said_for(self.acting)
        if mask is None:
            self.peft_watch.look()
            if any(layer.active for layer in self.layers):
                given = named_inputs(module, args, kwargs)
                _check_labels(module, given)
                mask = where_it_acts(given)
        self._enter(module, mask)

    def _begin_within(self, module: nn.Module, args: tuple) -> None:
        acting = self.acting
        # what a keyboard's interrupt has ended runs no hooks
        acting.forwards = tuple(entry for entry in acting.forwards if entry[0] is not module and _is_running(entry[0]))
        # of a forward of the whole model it is known already
        self._enter(module, acting.mask if acting.forwards else said_for(acting))

    def _enter(self, module: nn.Module, mask: Mask | None) -> None:
        acting = self.acting
        # one that was interrupted may have left something
        going_on = [entry for entry in acting.forwards if entry[0] is not module]
        acting.forwards = (*going_on, (module, acting.mask if going_on else None))
        acting.mask = mask

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        acting = self.acting
        if acting.forwards and acting.forwards[-1][0] is module:
            acting.mask = acting.forwards[-1][1]
            acting.forwards = acting.forwards[:-1]


def named_inputs(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward is called with, by name; what it is not given, or given None, is left out."""
    names = list(inspect.signature(module.forward).parameters) if args else []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None}


def _check_labels(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise ValueError for labels of a model that does not predict next tokens, such as a classifier of tokens."""
    generates = getattr(module, "can_generate", None)
    if "labels" in given and generates is not None and not generates():
        raise ValueError(
            f"the labels of a {type(module).__name__} are not tokens that follow, and do not say where an answer "
            f"begins: {SAY_IT}"
        )


def where_it_acts(given: Mapping[str, Any]) -> Mask:
    """The tokens of a forward from the last one of each prompt on: (B, S) bool, or "all".

    given: the forward's inputs by name.

    * `labels` (B, S), or `shift_labels`: from the token before the first label that is not -100. Examples that share a
      row are told apart by `position_ids` that begin anew, by `cu_seq_lens_q`, by `seq_idx`, or by what a
      `PackedCollator` brings.
    * an empty cache, as `generate` passes it with a prompt: the last token of each row.
    * a cache with something in it, and one token per row: every token.

    Raises ValueError for all else.
    """
    if "labels" in given or "shift_labels" in given:
        return _by_labels(given)
    cache = given_cache(given)
    if cache is not None:
        return _by_cache(given, cache)
    raise ValueError(UNKNOWN)


def answers_of(labels: Tensor, starts: Tensor | None = None, *, shifted: bool = False) -> Tensor:
    """(B, S) bool: true from the token before the first label of each example to the example's end.

    labels: (B, S) int64, -100 where there is none; a token's own, or with shifted those of the token that follows.
    starts: (B, S) bool, true where a further example begins in a row. A row without labels is false throughout.
    """
    following = labels
    if not shifted:
        following = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)), 1)
    predicts = following != IGNORED
    if starts is not None and not shifted:
        # nothing of the next example is predicted by the last token of one
        predicts = predicts & ~torch.cat((starts[:, 1:], starts.new_zeros(len(starts), 1)), 1)
    seen = predicts.cumsum(1)
    if starts is None:
        return seen > 0
    before = torch.where(starts, seen - predicts.long(), 0).cummax(1).values
    return seen > before


def _by_labels(given: Mapping[str, Any]) -> Tensor:
    shifted = "packed_rows" in given or "labels" not in given
    labels = given["labels"] if "labels" in given else given["shift_labels"]
    shape = _tokens(given).shape
    if "labels" not in given and labels.dim() == 1:
        # those of the kept tokens alone
        keep = given.get("logits_to_keep")
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != shape:
            raise ValueError(UNKNOWN)
        labels = torch.where(keep, 0, IGNORED)
    if labels.shape != shape:
        raise ValueError(
            f"the vectors act on answers alone (positions='answer'): expected labels of the tokens' shape "
            f"{tuple(shape)}, got {tuple(labels.shape)}; or {SAY_IT}"
        )
    if "packed_rows" in given:
        return _in_packed_rows(labels, given["packed_rows"], given["packed_places"])
    return answers_of(labels, _starts(given, shape), shifted=shifted)


def _in_packed_rows(following: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """(1, N) bool of a PackedCollator's batch, see `cpu.packed_rows`. following: (1, N), the label of the next token.

    What examples share predicts no label, and belongs to their prompts.
    """
    shared, width = following.shape[1] - len(places), rows.shape[1]
    row, column = places // width, places % width
    first = torch.where(following[0, shared:] != IGNORED, column, width)
    begins = first.new_full((len(rows),), width).scatter_reduce(0, row, first, "amin")
    acts = torch.zeros_like(following, dtype=torch.bool)
    acts[0, shared:] = column >= begins[row]
    return acts


def _starts(given: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """(B, S) bool: where an example begins that is not the first of its row; None where all rows hold one."""
    positions, padding = given.get("position_ids"), given.get("attention_mask")
    found: list[Tensor] = []
    if isinstance(positions, Tensor):
        if positions.dim() != 2:
            raise ValueError(
                f"positions of {positions.dim()} dimensions do not say where examples begin, expected 2: leave "
                f"position_ids out, or {SAY_IT}"
            )
        positions = positions.expand(shape)
        found.append(positions[:, 1:] <= positions[:, :-1])
    if "seq_idx" in given:
        indices = given["seq_idx"].view(shape)
        found.append(indices[:, 1:] != indices[:, :-1])
    if isinstance(ends := given.get("cu_seq_lens_q"), Tensor):
        marks = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=ends.device)
        marks[ends.long()] = True
        found.append(marks[:-1].view(shape)[:, 1:])
    if isinstance(padding, Tensor) and padding.dim() == 2:
        if padding.shape == shape:
            # some number the examples of a row there
            here, later = padding[:, :-1], padding[:, 1:]
            found.append((here != later) & (here != 0) & (later != 0))
    elif padding is not None and not found:
        raise ValueError(f"an attention mask of one's own does not say where examples begin: {SAY_IT}")
    if not found:
        return None
    device = _tokens(given).device
    begins = torch.stack([each.to(device) for each in found]).any(0)
    return torch.cat((begins.new_zeros(shape[0], 1), begins), 1)


def _by_cache(given: Mapping[str, Any], cache: Any) -> Mask:
    tokens = _tokens(given)
    step = _step_of_generate()
    if step == "chunks":
        raise ValueError(
            "the vectors act on answers alone (positions='answer'), and a prompt in chunks (prefill_chunk_size) does "
            "not say which of them is the last: generate without it, or run the prompt by itself inside "
            "handle.acting_on(mask) and pass its cache to generate"
        )
    if tokens.shape[1] == 1:
        return EVERYWHERE
    if not is_empty(cache) or step in ("assisted", "decoding"):
        raise ValueError(
            f"the vectors act on answers alone (positions='answer'), and {tokens.shape[1]} tokens per row with a cache "
            "may be prompt or answer (a chat that goes on, assisted decoding, a prompt in parts, a model that keeps "
            f"nothing in its cache): {SAY_IT}"
        )
    if given.get("use_cache") is False:
        raise ValueError(UNKNOWN)
    if not _ends_with_tokens(given.get("attention_mask"), tokens.shape[1]):
        raise ValueError("a prompt's last token must be the last of its row: pad prompts on the left")
    acts = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    acts[:, -1] = True
    return acts


def _tokens(given: Mapping[str, Any]) -> Tensor:
    """(B, S): ids of a forward, or one number of each embedding."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(tokens := given.get(name), Tensor):
            return tokens if name == "input_ids" else tokens[..., 0]
    raise ValueError(UNKNOWN)


def _ends_with_tokens(mask: Any, width: int) -> bool:
    """Whether the last token of every row is no padding. mask: as a model takes it, (B, S) or (B, 1, S, keys)."""
    if isinstance(mask, Mapping):
        # by kinds of layers; one that masks nothing is None
        return all(_ends_with_tokens(each, width) for each in mask.values())
    if mask is None:
        return True
    if mask.dim() == 2:
        return bool((mask[:, -1] != 0).all())
    if mask.dim() != 4 or mask.shape[-1] < width:
        return False
    # a token that is no padding sees itself
    itself = mask[:, :, -1, width - 1]
    return bool((itself if itself.dtype == torch.bool else itself == 0).all())


def _is_running(module: nn.Module) -> bool:
    """Whether a module is being called in this thread. In code that a compiler has taken apart: that is assumed."""
    if torch.compiler.is_compiling():
        return True
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name.startswith("torch_dynamo_resume") or (name == "_call_impl" and frame.f_locals.get("self") is module):
            return True
        frame = frame.f_back
    return False


def _step_of_generate() -> str | None:
    """What transformers' generate is at: "prompt", "chunks" of one, "assisted" or "decoding"; None outside of it.

    Of some forwards nothing else tells: the first chunk of a prompt looks like a prompt.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name in _GENERATING and frame.f_globals.get("__name__") == _GENERATION:
            if name != "_prefill":
                return "assisted" if name == "_assisted_decoding" else "decoding"
            config = frame.f_locals.get("generation_config")
            return "prompt" if getattr(config, "prefill_chunk_size", None) is None else "chunks"
        frame = frame.f_back
    return None


def language_model(ancestors: Iterable[nn.Module]) -> nn.Module:
    """Of the modules from a model's top to its decoder the one that takes labels and a cache: transformers' own.

    What PEFT and others put around it is left out, since they hand generation to what they hold.
    """
    ancestors = list(ancestors)
    own = (m for m in ancestors if any(kind.__name__ == "PreTrainedModel" for kind in type(m).__mro__))
    return next(own, ancestors[0])
