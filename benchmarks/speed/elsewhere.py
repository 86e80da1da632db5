"""What a machine's summary lacks, from the summaries of other machines: python -m benchmarks.speed.elsewhere [RESULTS]

A ratio is of one machine, whichever. So a summary may hold ratios of several, as long as each says of which it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.speed.cells import RESULTS
from benchmarks.speed.results import ELSEWHERE, TARGETS
from lofit_fast.files import write_json


def filled(summary: dict, results: Path) -> dict:
    """A summary with the promised ratios that it lacks, from <results>/*/summary.json, the first by name that has one.

    A model's key ELSEWHERE says which ratios are whose, by folder; that of `meta` has those machines' own `meta`. What
    was filled in before is looked up again.
    """
    summary = {name: dict(content) for name, content in summary.items()}
    others = {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/summary.json"))}
    used = set()
    for model in (name for name in summary if name != "meta"):
        of_model = summary[model]
        before = of_model.pop(ELSEWHERE, {})
        for key in (target[0] for target in TARGETS.get(model, ())):
            if of_model.get(key) is not None and key not in before:
                continue
            found = next((at for at, other in others.items() if other.get(model, {}).get(key) is not None), None)
            taken = others[found][model] if found else {}
            of_model |= {name: taken.get(name) for name in (key, f"{key}_interval", f"{key}_rounds")}
            if found:
                of_model.setdefault(ELSEWHERE, {})[key] = found
                used.add(found)
    summary["meta"].pop(ELSEWHERE, None)
    if used:
        summary["meta"][ELSEWHERE] = {name: others[name]["meta"] for name in sorted(used)}
    return summary


def main(
    results: Annotated[Path, typer.Argument(help="Folder with the summary.json of make bench.")] = RESULTS,
) -> None:
    """Fill in what a summary lacks from the summaries in folders beside it."""
    path = results / "summary.json"
    write_json(path, filled(json.loads(path.read_text()), results))
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
