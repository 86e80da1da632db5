"""Which attention training uses where that is left to us. A rule, for attention moves the last bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.pack import GROUPED
from lofit_fast.data.padding import padded_on_the_right
from lofit_fast.models.row_picks import picks_in_rows
from lofit_fast.models.trials import all_logits, difference, rounding, said_of, trial_examples, tried_once, trying
from lofit_fast.patching.architectures import find_projections, text_config
from lofit_fast.patching.families import ARCHITECTURES
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.training.engine.attention_scope import OURS, UnusableAttention, attending
from lofit_fast.training.engine.causal_attention import CAUSAL
from lofit_fast.training.engine.cpu_extras import HAS_CPU_EXTRAS

FLASH = "flash_attention_2"
# attentions that torch has no gradients of on a kind of device; compiling one forward takes minutes
_NO_GRADIENTS = {("flex_attention", "cpu")}
# the largest head of flash-attn's kernels
_WIDEST_FLASH = 256


@dataclass(frozen=True)
class Facts:
    """What the choice looks at. device: its type. known: whether the family is in the table of architectures.

    head_dim: the largest of any layer, for families where it varies by layer.
    picks: whether attention picks tokens in long rows. flash: whether flash-attn is installed and the family supports
    it. packs: whether examples may share a row.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    known: bool
    picks: bool
    flash: bool
    packs: bool


@dataclass(frozen=True)
class Candidate:
    """An attention, and where it is tried. It is taken where the model's logits with it are those with its own."""

    attention: str
    fits: Callable[[Facts], bool]


# the first that fits and passes; the model's own where none does
CANDIDATES = (
    Candidate(GROUPED, lambda facts: facts.device == "cpu" and HAS_CPU_EXTRAS and facts.known),
    # packed rows without padding; padded ones make it count tokens in every layer
    Candidate(
        FLASH,
        lambda facts: (
            facts.device == "cuda"
            and facts.flash
            and facts.packs
            and facts.dtype in (torch.float16, torch.bfloat16)
            and facts.head_dim <= _WIDEST_FLASH
        ),
    ),
    # what picks tokens may pick padding, in longer rows than a trial's
    Candidate(CAUSAL, lambda facts: facts.device == "cuda" and facts.known and not facts.picks),
)


def best_attention(model: nn.Module, device: torch.device, *, packs: bool = True) -> str:
    """The first of CANDIDATES that fits and gives the model's own logits; the model's own attention if none does.

    packs: whether examples may be laid in one row.
    """
    own = text_config(model)._attn_implementation
    facts = facts_of(model, device, packs)
    fitting = (row.attention for row in CANDIDATES if row.fits(facts))
    return next((name for name in fitting if attention_refusal(model, name) is None), own)


def facts_of(model: nn.Module, device: torch.device, packs: bool) -> Facts:
    """What is known of a model on a device without running it."""
    config = text_config(model)
    flash = find_spec("flash_attn") is not None and getattr(model, "_supports_flash_attn", False)
    return Facts(
        device=device.type,
        dtype=dtype_of(model),
        head_dim=_widest_head(model),
        known=config.model_type in ARCHITECTURES,
        picks=picks_in_rows(model) is not None,
        flash=flash,
        packs=packs,
    )


def _widest_head(model: nn.Module) -> int:
    """The largest head of any layer; 0 where it cannot be read off, and a trial has to find out."""
    try:
        return max(projection.head_dim for projection in find_projections(model))
    # another attachment's model
    except ValueError:
        return 0


def check_head_counts(model: nn.Module) -> None:
    """Raise ValueError for query heads that the model's attention cannot share among the heads of keys and values."""
    config = text_config(model)
    queries, keys = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if not isinstance(queries, int) or not isinstance(keys, int) or keys < 1 or not queries % keys:
        return
    try:
        with trying(model):
            all_logits(model, CompletionCollator(0)(trial_examples(model)))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} has {queries} query heads on {keys} heads of keys and values, and cannot run: "
            f"expected a multiple of {keys}; correct num_attention_heads or num_key_value_heads of its config"
        ) from error


def attention_refusal(model: nn.Module, name: str) -> str | None:
    """Why the model cannot run with an attention, or None where its logits are those of its own attention.

    Where its own does not run, the other one has to run and give numbers.
    """
    own = text_config(model)._attn_implementation
    return None if name == own else tried_once(model, ("attention", name, own), lambda: _refusal(model, name))


def _refusal(model: nn.Module, name: str) -> str | None:
    if (name, kind := device_of(model).type) in _NO_GRADIENTS:
        return f"attention {name!r} cannot be used here: torch has no gradients of it on a device of type {kind}"
    # its code hands what it picks to the attentions that it knows; a trial's rows are too short to tell
    if name in OURS and (picks := picks_in_rows(model)):
        return (
            f"attention {name!r} cannot be used here: {type(model).__name__} picks what it attends to in long rows "
            f"({picks} of its config), which {name!r} would not be told"
        )
    # so few tokens that attention GROUPED computes as it does in training
    batch = CompletionCollator(0, pad_to_multiple_of=1)(trial_examples(model))
    real = batch["attention_mask"].bool()
    with trying(model), padded_on_the_right():
        try:
            own = all_logits(model, batch)[real]
        # without it the attention can only be tried by itself
        except Exception:
            own = None
        try:
            with attending(model, name):
                got = all_logits(model, batch)[real]
        except UnusableAttention as error:
            return str(error)
        except Exception as error:
            return f"attention {name!r} cannot be used here: {said_of(error)}"
    # eager attention makes no numbers of float64 where a window holds padding alone
    comparable = own is not None and own.isfinite().all()
    away = difference(got, own if comparable else got)
    if away <= rounding(model):
        return None
    return f"attention {name!r} cannot be used here: {type(model).__name__}'s logits are {away:.1e} away from its own"
