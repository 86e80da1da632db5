"""Whether a model tells the examples of a packed row apart. It is tried, since families lose them in many ways.

Linear attention, convolutions and state spaces run on over the boundary, positions of several axes or of none say
nothing of it, and a cache makes transformers overlook it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import GROUPED
from lofit_fast.models.row_picks import picks_in_rows
from lofit_fast.models.trials import all_logits, difference, rounding, said_of, trial_examples, tried_once, trying
from lofit_fast.training.engine.attention_scope import attending


def packing_leak(model: nn.Module, attention: str, collator_of: Callable[[bool], Callable]) -> str | None:
    """Why a model's packed batches are not the same as padded ones, or None where they are.

    attention: what it will run with. collator_of: the collator of packed batches (True), and of padded ones.
    Raises ValueError for an attention that the model does not have.
    """
    return tried_once(model, ("packing", attention), lambda: _leak(model, attention, collator_of))


def _leak(model: nn.Module, attention: str, collator_of: Callable[[bool], Callable]) -> str | None:
    if picks := picks_in_rows(model):
        return (
            f"{type(model).__name__} picks what it attends to in the whole row ({picks} of its config), "
            "whatever examples the row holds"
        )
    rows = trial_examples(model)
    with trying(model), attending(model, attention):
        try:
            padded = _labelled(model, collator_of(False)(rows))
            packed = _labelled(model, collator_of(True)(rows))
            changed = _labelled(model, collator_of(True)(trial_examples(model, other=True)))
        except Exception as error:
            return f"{type(model).__name__} does not take packed rows: {said_of(error)}"
    allowed = rounding(model)
    away = difference(packed, padded)
    if away > allowed:
        return f"in a packed row {type(model).__name__}'s logits are {away:.1e} away from those of the examples apart"
    # another first example, of which the others should not know: here nothing is summed in another order
    first = len(rows[0]["input_ids"]) - rows[0]["labels"].count(IGNORED)
    leak = difference(changed[first:], packed[first:])
    if leak > allowed / 4:
        return f"in a packed row one example moves another's logits by {leak:.1e} in {type(model).__name__}"
    return None


def packs(attention: str) -> bool:
    """Whether packing is a gain with an attention: others compute what a long row's mask hides."""
    return attention == GROUPED or attention.startswith("flash_attention")


def _labelled(model: nn.Module, batch) -> Tensor:
    """(labelled tokens, vocabulary), example after example."""
    logits = all_logits(model, batch)
    return logits[batch["logits_to_keep"].to(logits.device)]
