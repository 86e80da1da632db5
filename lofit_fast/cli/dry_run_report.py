"""What `train --dry-run` prints: encoded examples with the learned tokens marked, numbers, recipe and engine."""

from __future__ import annotations

import json

import typer
from rich.table import Table
from rich.text import Text

from lofit_fast.cli.command import out, say_error

# characters of a part of an example, and refused texts, that a terminal shows; JSON has all
_ROOM = 600
_REFUSED = 10
_LEARNED = "bold green"


def show_dry_run(base, tokenizer, examples, objective, recipe, engine, heads, as_json: bool, title: str) -> None:
    """Print what training `objective` of the task `examples` would do. Exits with 1 where it would be refused.

    Raises what `dry_run` raises.
    """
    from lofit_fast.training.dry_run import dry_run

    how = {"engine": engine, "heads": heads, "progress": not as_json}
    found = dry_run(base, tokenizer, objective, recipe, validation=len(examples.choices or examples.validation), **how)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _print(found, title)
    if found.refused:
        if not as_json:
            say_error(_refusal(found))
        raise typer.Exit(1)


def _print(found, title: str) -> None:
    for shown in found.shown:
        learned = sum(part.tokens for part in shown.parts if part.learned)
        tokens = sum(part.tokens for part in shown.parts)
        out.print(Text(f"example {shown.example}, {shown.role}: {tokens} tokens, {learned} learned", "bold"))
        # not as markup, and not wrapped: the text is the data's
        out.print(_coloured(shown.parts), soft_wrap=True, highlight=False)
        out.print()
    out.print(_table(found, title))
    for refused in found.refused[:_REFUSED]:
        out.print(Text(f"refused: example {refused.example}, {refused.role}: {refused.reason}"), soft_wrap=True)


def _coloured(parts) -> Text:
    from lofit_fast.data.preview import marked

    return Text.assemble(*((marked([part], _ROOM), _LEARNED if part.learned else "") for part in parts))


def _table(found, title: str) -> Table:
    table = Table("", "", title=f"dry run: {title}", show_header=False)
    limit = "no limit is known" if found.limit is None else f"limit {found.limit}"
    rows = {
        "trained on": found.objective,
        "examples": found.examples,
        "held out": found.validation,
        "tokens of an epoch": f"{found.tokens}, of which {found.learned_tokens} learned, in [[ ]] above",
        "longest": f"{found.longest} tokens, {limit}",
        "truncated": found.truncated,
        "refused": len(found.refused),
        "recipe": _listed(found.recipe),
        **{f"engine of {stage}": _listed(engine) for stage, engine in found.engine.items()},
    }
    if found.prefix_cache:
        rows["prefix cache of tune"] = _prefix(found.prefix_cache)
    for key, value in rows.items():
        table.add_row(key, Text(str(value)))
    return table


def _listed(settings: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _prefix(worth: dict[str, object]) -> str:
    saved = f"{worth['layers']} layers below, {worth['bytes'] / 1e9:.3g} GB, {worth['saved']:.0%} of operations saved"
    return saved if worth["refusal"] is None else f"{saved}: auto keeps none, {worth['refusal']}"


def _refusal(found) -> str:
    first = found.refused[0]
    return (
        f"training would stop: {len(found.refused)} texts cannot be used, the first in example {first.example}: "
        f"{first.reason}"
    )
