"""docs/reliability.md from docs/results/reliability/*.json, each of which a proof has written.

python -m benchmarks.proof.reliability.reliability_page [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lofit_fast.files import write_text

RESULTS = Path("docs") / "results" / "reliability"
PAGE = Path("docs") / "reliability.md"
# number -> what the item is called
ITEMS = {
    1: "Kill anywhere",
    2: "Corrupt anything",
    3: "Threads",
    4: "Processes",
    5: "Wrong numbers are noticed",
    6: "Determinism",
    7: "Soak",
    8: "Old and new",
    9: "Supply chain",
    10: "Properties",
}
NEEDED = ("item", "what", "tried", "failed", "named", "command", "seconds", "processor", "commit")

_PAGE = """\
# Reliability

What was tried to lose a run, to make a model silently wrong, or to make the library run what it only reads; how often;
and how often it succeeded. `make reliability` tries all of it again in full, for hours, and goes on if interrupted;
each row has a command of its own. `make test` runs a sample of each.

Written by `python -m benchmarks.proof.reliability.reliability_page` from the files in
[results/reliability](results/reliability), which the commands write. Evidence: counts of trials on tiny models on a
CPU, in float32 unless said. No GPU ran any of it.

{table}

{absent}## What is open

{named}

## By kind

{kinds}

## What was measured beside it

{figures}

## Where it ran

{where}
"""


def records(folder: Path = RESULTS) -> dict[str, dict]:
    """The rows by the names of their files. Raises ValueError for a file that lacks a key."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for name, row in found.items():
        if lacking := [key for key in NEEDED if key not in row]:
            raise ValueError(f"{folder / name}.json lacks {', '.join(lacking)}")
    return dict(sorted(found.items(), key=lambda pair: (pair[1]["item"], pair[0])))


def page(rows: dict[str, dict]) -> str:
    """The page as Markdown."""
    known = {row["item"] for row in rows.values()}
    absent = [f"{number}. {title}" for number, title in ITEMS.items() if number not in known]
    tried = [[_item(r), r["what"], _count(r["tried"]), _count(r["failed"]), f"`{r['command']}`"] for r in rows.values()]
    named = [f"* {ITEMS[row['item']]}: {_plain(words)}" for row in rows.values() for words in row["named"]]
    kinds = [
        [_item(row), _plain(kind), _count(found["tried"]), _count(found["failed"])]
        for row in rows.values()
        for kind, found in row.get("counts", {}).items()
    ]
    figures = [
        [_item(row), _plain(name), _count(figure)]
        for row in rows.values()
        for name, figure in row.get("figures", {}).items()
    ]
    where = [[name, row["commit"], row["processor"], _count(row["seconds"])] for name, row in rows.items()]
    return _PAGE.format(
        table=_table(("item", "what was tried", "times", "failures", "command"), tried),
        absent=f"Not recorded yet: {'; '.join(absent)}.\n\n" if absent else "",
        named="\n".join(named) or "Nothing that was tried.",
        kinds=_table(("item", "kind", "times", "failures"), kinds),
        figures=_table(("item", "figure", "value"), figures) if figures else "Nothing.",
        where=_table(("file", "commit", "processor", "seconds"), where),
    )


def _item(row: dict) -> str:
    return f"{row['item']}. {ITEMS[row['item']]}"


def _count(number: int) -> str:
    return f"{number:,}"


def _plain(text: str) -> str:
    """Words as they stand in a cell or a line: nothing in them is Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. With --check it writes nothing, and returns 1 where the page is another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is what the results give")
    checks = parser.parse_args(arguments).check
    text = page(records())
    if checks:
        return int(PAGE.read_text() != text)
    write_text(PAGE, text)
    print(f"{PAGE}: {len(records())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
