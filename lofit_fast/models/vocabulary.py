"""Token ids that a model has no embedding for: refused by name, before a forward fails on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a model has embeddings for, counted from 0; None where it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = None if find is None else find()
    # a class that leaves it open says so by an error
    except NotImplementedError:
        return None
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None


def check_ids(model: nn.Module, rows: Iterable[Sequence[int]], what: str = "example") -> None:
    """Raise ValueError for a token id that the model has no embedding for, naming it, its place and the vocabulary.

    rows: token ids. what: one of them, in the error; they are counted from 1.
    """
    size = vocabulary_of(model)
    if size is None:
        return
    for number, row in enumerate(rows, start=1):
        if row and not 0 <= min(row) <= max(row) < size:
            place, token = next((at, one) for at, one in enumerate(row, start=1) if not 0 <= one < size)
            raise ValueError(f"{what} {number}: token {place} of {len(row)} has the id {token}, {_expected(size)}")


def check_padding(model: nn.Module, pad: int | None, rows: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where rows will be filled with a token that the model has no embedding for.

    One row is never filled.
    """
    size = vocabulary_of(model)
    if size is not None and pad is not None and len(rows) > 1 and not 0 <= pad < size:
        raise ValueError(f"the tokenizer's padding token has the id {pad}, {_expected(size)}")


def _expected(size: int) -> str:
    return (
        f"expected 0 to {size - 1}, as the model has {size} embeddings: load the model's own tokenizer, or, where "
        "tokens were added to it, call model.resize_token_embeddings(len(tokenizer))"
    )
