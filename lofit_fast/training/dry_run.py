"""What a training would learn from and how it would run, without training: for a look before the long run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from lofit_fast.config import GivenHeads, Recipe
from lofit_fast.data.encode import IGNORED, Encoded, encode
from lofit_fast.data.given_examples import given_examples
from lofit_fast.data.preview import Part, preview
from lofit_fast.files import as_json
from lofit_fast.tasks.preference_rows import as_preference
from lofit_fast.tasks.task import Example
from lofit_fast.training.engine import Engine
from lofit_fast.training.fit import rehearse
from lofit_fast.training.given_arguments import check_given
from lofit_fast.training.model_limits import token_limit
from lofit_fast.training.objectives import Objective, Preferences


@dataclass(frozen=True)
class Shown:
    """One encoded text. example: its number from 1. role: "completion", "chosen" or "rejected"."""

    example: int
    role: str
    parts: list[Part]


@dataclass(frozen=True)
class Refused:
    """A text that cannot be trained on, and why.

    role: as in `Shown`, or "validation", or "preference" of a row that is none.
    """

    example: int
    role: str
    reason: str


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` has found.

    objective: "completions" or "preferences". examples: to train on. validation: examples held out. tokens,
    learned_tokens: of an epoch, that is, of preferences the chosen and the first rejected answer. longest: tokens of
    the longest text, and limit what it may have. truncated: texts that were cut, 0, since none ever is. refused: texts
    for which training would stop with an error. recipe: as plain data. engine: per step the settled engine as plain
    data; empty where texts are refused. prefix_cache: what one would save in step 2, the fields of
    `prefix_cache.worth.Worth`; without given heads, if every head that may be kept were. shown: the first encoded
    texts.
    """

    objective: str
    examples: int
    validation: int
    tokens: int
    learned_tokens: int
    longest: int
    limit: int | None
    truncated: int
    refused: list[Refused]
    recipe: dict[str, object]
    engine: dict[str, dict[str, object]]
    prefix_cache: dict[str, object] | None
    shown: list[Shown]

    def as_dict(self) -> dict[str, object]:
        """All of it as plain data, for JSON."""
        return as_json(asdict(self))


def dry_run(
    model: nn.Module,
    tokenizer,
    objective: Objective,
    recipe: Recipe | None = None,
    *,
    engine: Engine | None = None,
    heads: GivenHeads = None,
    validation: int | None = None,
    show: int = 3,
    progress: bool = False,
) -> DryRun:
    """Encode the data, settle the engine and check everything that can be checked, as `fit` would, and stop there.

    Args:
        model, tokenizer: as for `fit`; neither is changed.
        objective: `Completions(train, evaluation)` or `Preferences(pairs)` of `lofit_fast.training.objectives`.
        recipe, engine, heads: as for `fit`.
        validation: held-out examples that the objective does not hold: of preferences, the choices.
        show: examples to decode again.
        progress: whether a bar shows tokenizing that takes more than a second.

    Raises:
        TypeError, ValueError, ImportError: what `fit` would raise before its first step, except for texts that cannot
            be encoded, or are none: those are listed, all of them, in `refused`.
    """
    check_given(model, tokenizer, recipe, engine)
    recipe = recipe or Recipe()
    limit = token_limit(model, recipe.max_length)
    try:
        how = {"engine": engine, "heads": heads, "progress": progress}
        data, settled, worth = rehearse(model, tokenizer, objective, recipe, **how)
        read, refused = list(_read(objective, data.rows)), []
        held_out = len(getattr(data, "judged", ()))
    except (TypeError, ValueError):
        # a training stops at the first text that it cannot use: here all of them are found
        settled, worth, (read, refused, held_out) = {}, None, _sifted(tokenizer, objective, limit)
        if not refused:
            raise
    lengths = [len(row["input_ids"]) for _, _, row in read]
    trained_on = {number for number, _, _ in read} | {r.example for r in refused if r.role != "validation"}
    return DryRun(
        objective=objective.name,
        examples=len(trained_on),
        validation=held_out if validation is None else validation,
        tokens=sum(lengths),
        learned_tokens=sum(label != IGNORED for _, _, row in read for label in row["labels"]),
        longest=max(lengths, default=0),
        limit=limit,
        truncated=0,
        refused=refused,
        recipe=asdict(recipe),
        engine={stage: asdict(engine) for stage, engine in settled.items()},
        prefix_cache=None if worth is None else asdict(worth),
        shown=[Shown(number, role, preview(tokenizer, row)) for number, role, row in read if number <= show],
    )


def _read(objective: Objective, rows: Sequence[Encoded]) -> Iterator[tuple[int, str, Encoded]]:
    """(number, role, row) of an epoch's rows."""
    roles = ("chosen", "rejected") if isinstance(objective, Preferences) else ("completion",)
    yield from ((i // len(roles) + 1, roles[i % len(roles)], row) for i, row in enumerate(rows))


def _sifted(tokenizer, objective: Objective, limit: int | None) -> tuple[list[tuple], list[Refused], int]:
    """What an epoch could read, as `_read` gives it, every text that would be refused, and how many are held out."""
    read, refused, first, held_out = [], [], set(), 0
    for number, role, text in _texts(objective):
        held_out += role == "validation"
        try:
            if isinstance(text, ValueError):
                raise text
            row = encode(tokenizer, text, limit)
        except (TypeError, ValueError) as error:
            refused.append(Refused(number, role, str(error)))
            continue
        # an epoch draws one rejected answer
        if role != "validation" and (number, role) not in first:
            first.add((number, role))
            read.append((number, role, row))
    return read, refused, held_out


def _texts(objective: Objective) -> Iterator[tuple[int, str, Example | Mapping[str, str] | ValueError]]:
    """(number, role, text) of all that a training encodes; of a row that is no preference, what is wrong with it."""
    if isinstance(objective, Preferences):
        for number, row in enumerate(given_examples(objective.preferences), start=1):
            try:
                pair = as_preference(row, f"preference {number}")
            except ValueError as error:
                yield number, "preference", error
                continue
            yield number, "chosen", Example(pair.prompt, pair.chosen)
            yield from ((number, "rejected", Example(pair.prompt, answer)) for answer in pair.rejected)
        return
    for role, data in (("completion", objective.train), ("validation", objective.evaluation)):
        yield from ((number, role, row) for number, row in enumerate(given_examples(data), start=1))
