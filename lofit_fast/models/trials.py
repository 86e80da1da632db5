"""What a model does, found out by running it on a few tokens: a comparison of results, never of times.

No weight, mode or random number changes. Families differ in ways that no list keeps up with; a forward pass tells.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

from lofit_fast.data.collate import KEPT_ROWS, on_device
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.placement import device_of
from lofit_fast.random_states import same_random_numbers

# tokens of the examples' own, after what all of them begin with: of different lengths, so that some are padded
OWN, SHARED = (7, 5, 3), 4
_Answer = TypeVar("_Answer")
# what has been found out in a scope of `remembering`
_ANSWERS: ContextVar[dict | None] = ContextVar("answers", default=None)
_TARGETS = ("labels", "shift_labels", "logits_to_keep", KEPT_ROWS)


def trial_examples(model: nn.Module, *, other: bool = False) -> list[Encoded]:
    """Examples of distinct, ordinary tokens, with labels after what all begin with.

    other: whether the first has other tokens, as many, while the rest is as it was.
    """
    ids = iter(ordinary_tokens(model, SHARED + sum(OWN) + OWN[0]))
    shared = [next(ids) for _ in range(SHARED)]
    rows = [shared + [next(ids) for _ in range(own)] for own in OWN]
    if other:
        rows[0] = shared + list(ids)
    return [{"input_ids": row, "labels": [IGNORED] * SHARED + row[SHARED:]} for row in rows]


def ordinary_tokens(model: nn.Module, count: int) -> list[int]:
    """Distinct ids, spread over the vocabulary, none of which a config names for a purpose of its own."""
    configs = {id(config): config for config in (model.config, text_config(model))}.values()
    values = (value for config in configs for name, value in vars(config).items() if "token_i" in name)
    special = {one for value in values for one in (value if isinstance(value, list | tuple) else [value])}
    size = text_config(model).vocab_size
    step = max(1, size // (count + len(special)))
    ordinary = [token for token in range(step // 2, size, step) if token not in special] or [0]
    # a vocabulary of few tokens repeats them
    return (ordinary * -(-count // len(ordinary)))[:count]


@contextmanager
def remembering() -> Iterator[None]:
    """A scope in which each question about a model is tried once, see `tried_once`.

    For a training of several stages: between them the model's code and weights stay what they are. Scopes may be
    nested; what is known goes with the outermost.
    """
    if _ANSWERS.get() is not None:
        yield
        return
    token = _ANSWERS.set({})
    try:
        yield
    finally:
        _ANSWERS.reset(token)


def tried_once(model: nn.Module, question: Hashable, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` finds out about a model, or has found out in this scope of `remembering`. An error is no answer.

    question: all that the answer depends on but the model.
    """
    answers, key = _ANSWERS.get(), (id(model), question)
    if answers is None:
        return ask()
    if key not in answers:
        answers[key] = ask()
    return answers[key]


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """A scope in eval mode and without gradients, after which modes and random numbers are as they were."""
    with same_random_numbers(), eval_mode(model), torch.no_grad():
        yield


def as_the_base(model: nn.Module) -> AbstractContextManager[None]:
    """A scope in which a model, patched or not, computes what its base computes."""
    handle = handle_of(model)
    return nullcontext() if handle is None else handle.disabled()


def all_logits(model: nn.Module, batch) -> Tensor:
    """(B, S, vocabulary): of a collator's batch, whatever logits it asks for."""
    asked = {"use_cache": False, **{name: value for name, value in batch.items() if name not in _TARGETS}}
    return model(**on_device(asked, device_of(model))).logits


def labelled_logits(model: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """(labelled tokens, vocabulary) of the logits that a collator's batch asks for, and the loss.

    Without the rest: what stands in padding is anything.
    """
    out, following = model(**{**batch, "use_cache": False}), batch.get("shift_labels")
    logits = out.logits
    if following is None:
        logits, following = logits[:, :-1], batch["labels"][:, 1:]
    return logits.flatten(0, -2)[following.flatten().to(logits.device) != IGNORED], out.loss


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest of |got - expected| / |expected| over rows (..., n); infinite for other shapes or no numbers."""
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.double().flatten(0, -2), expected.double().flatten(0, -2)
    away = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(away, nan=float("inf")).max().item()


def rounding(model: nn.Module) -> float:
    """What `difference` may come to where only the order of sums differs: half of the digits of the model's dtype.

    No less than float32's: families compute norms, positions and softmax in float32 whatever the weights are in.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    return max(torch.finfo(kind).eps for kind in kinds | {torch.float32}) ** 0.5


def said_of(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
