"""Prompts computed once for any number of adapters: their keys and values by the base, in memory.

For adapters whose vectors act on answers alone: everything before the last prompt token is then the base's under each
of them.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import DynamicCache

from lofit_fast.data.padding import padded
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.evaluation.generation_settings import StandingAlone
from lofit_fast.models.prompt_states import NotPlain, Slots, prompt_states
from lofit_fast.models.trials import as_the_base, difference, rounding, said_of
from lofit_fast.patching.architectures import find_projections
from lofit_fast.patching.cache_names import cache_name
from lofit_fast.patching.fold import decoder_of
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.placement import device_of


class SharedPrompts:
    """What the base of one model makes of prompts, for all evaluations that are given this object.

    gb: bound on what is held, in 10^9 bytes; prompts beyond it are computed anew each time. The model's weights must
    stay as they are meanwhile; adapters come and go by `lofit_fast.load` and `unpatch`. Several threads may be given
    it: one of them at a time computes prompts.
    Raises ValueError for a bound below 0.
    """

    def __init__(self, gb: float = 2.0) -> None:
        if not 0 <= gb < math.inf:
            raise ValueError(f"expected a finite gb >= 0, got {gb}")
        self.gb = gb
        self.computed = 0
        self._room = int(gb * 1e9)
        self._held: dict[tuple[int, ...], Tensor] = {}
        self._slots: Slots | None = None
        self._decoder: nn.Module | None = None
        # whether the model has shown that it can go on from them, or that it cannot
        self._proved = self._unfit = False
        self._lock = threading.RLock()

    def cache(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> DynamicCache | None:
        """A cache to generate from: of prompts without their last tokens, padded on the left; None if there is none.

        model: patched with vectors that act on answers alone, or not at all; in eval mode, without gradients.
        rows: token ids of the prompts, whole. None, with a warning that says why, for a model that keeps more of
        a token than keys and values, whose keys depend on the length of a whole sequence, or whose logits differ so.
        Raises ValueError for vectors that act on prompts too, and for another model than before.
        """
        handle = handle_of(model)
        if handle is not None and handle.acting is None:
            raise ValueError(
                "prompts cannot be shared by adapters whose vectors act on them (positions='all'): expected "
                "positions='answer'"
            )
        with self._lock:
            return self._cache(model, rows)

    def _cache(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> DynamicCache | None:
        decoder = decoder_of(model, [projection.name for projection in find_projections(model)])
        if self._decoder is not None and decoder is not self._decoder:
            raise ValueError("these prompts are of another model: expected one SharedPrompts per base model")
        self._decoder = decoder
        if self._unfit or max(map(len, rows)) < 2:
            return None
        try:
            # a trial of this batch cannot show what depends on the length of the next one
            if not self._proved and (reason := length_refusal(model)):
                raise NotPlain(reason)
            cache = self._laid(model, rows)
            if not self._proved and (reason := self._disagreement(model, rows)):
                raise NotPlain(reason)
            self._proved = True
        # generation goes on without it, whatever a model may raise
        except Exception as error:
            reason = str(error) if isinstance(error, NotPlain) else said_of(error)
            warnings.warn(f"prompts are not shared: {reason}. Each evaluation computes its own", stacklevel=3)
            self._unfit = True
            self._held.clear()
            return None
        return cache

    def _laid(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> DynamicCache:
        prompts = [tuple(row[:-1]) for row in rows]
        missing = sorted({prompt for prompt in prompts if prompt and prompt not in self._held}, key=len)
        now = self._computed(model, missing) if missing else {}
        found = [now[prompt] if prompt in now else self._held.get(prompt) for prompt in prompts]
        some = next(states for states in found if states is not None)
        laid = self._slots.laid([some[:0] if states is None else states for states in found])
        return self._slots.cache(laid.to(device_of(model)), grows=True)

    def _computed(self, model: nn.Module, prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Each with its states (P, W), on the CPU; what there is room for is held."""
        with as_the_base(model):
            states, self._slots = prompt_states(self._decoder, prompts, device_of(model))
        self.computed += len(prompts)
        # of their own: a slice would hold the whole batch
        now = {prompt: of_one[: len(prompt)].cpu().clone() for prompt, of_one in zip(prompts, states, strict=True)}
        for prompt, of_one in now.items():
            if of_one.nbytes <= self._room:
                self._held[prompt] = of_one
                self._room -= of_one.nbytes
        return now

    def _disagreement(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> str | None:
        """What the base says otherwise after its shortest and longest prompt with the cache than without; or None."""
        ordered = sorted(rows, key=len)
        ends = [ordered[0], ordered[-1]]
        ids, mask = (part.to(device_of(model)) for part in padded(ends, 0, side="left"))

        def first(**past) -> Tensor:
            told = {"output_logits": True, "return_dict_in_generate": True}
            how = StandingAlone(max_new_tokens=1, do_sample=False, pad_token_id=0, **told)
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=how, **past).logits[0]

        with as_the_base(model):
            away = difference(first(**{cache_name(model): self._laid(model, ends)}), first())
        return None if away <= rounding(model) else f"after kept prompts the model's logits differ by {away:.1e}"
