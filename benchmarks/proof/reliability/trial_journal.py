"""What a proof tries, and what came of it: a line per trial as it ends, and a row of docs/reliability.md at the end.

A trial is a key of its own, a kind, and a call that returns None where it held, or what went wrong in a sentence. The
journal lies in runs/reliability: a proof that is interrupted goes on, and tries nothing twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.proof.reliability.reliability_page import RESULTS
from benchmarks.speed.timing import machine
from lofit_fast.files import write_json

JOURNALS = Path("runs") / "reliability"
# what a proof notes beside its trials, in its own folder
FIGURES = "figures.json"
# of what failed, so many kinds are named
MOST_NAMED = 12


@dataclass(frozen=True)
class Trial:
    """key: another in every trial of a proof. kind: what it counts among. run: None, or what went wrong.

    tried: how many times it tries something.
    """

    key: str
    kind: str
    run: Callable[[], str | None]
    tried: int = 1


@dataclass(frozen=True)
class Proof:
    """One row. item: its number in docs/reliability.md. what: was tried. command: that tries it again."""

    name: str
    item: int
    what: str
    command: str


# (options, a folder to work in) -> the trials
Source = Callable[[argparse.Namespace, Path], Iterable[Trial]]


class Journal:
    """The trials of a proof so far, by key: (kind, what went wrong or None, how many times something was tried)."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path, self.seconds = path, 0.0
        # of the code that was tried: one that went on may have gone on with another
        self.commits: dict[str, None] = {}
        self.ended: dict[str, tuple[str, str | None, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        text = path.read_text() if path.is_file() else ""
        if text and not text.endswith("\n"):
            # a kill has cut the last line short
            path.write_text(f"{text}\n")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self._note(row)

    def add(self, trial: Trial, failed: str | None, seconds: float) -> None:
        """Note a trial that has ended."""
        row = {"key": trial.key, "kind": trial.kind, "failed": failed, "tried": trial.tried}
        row |= {"seconds": round(seconds, 3), "commit": commit()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._note(row)

    def _note(self, row: dict) -> None:
        self.ended[row["key"]] = row["kind"], row["failed"], row["tried"]
        self.seconds += row["seconds"]
        self.commits[row["commit"]] = None


def carried_out(trials: Iterable[Trial], journal: Journal, *, until: float | None = None, tell=print) -> bool:
    """Run the trials that have not ended yet; False where time was over first. until: of `time.monotonic`."""
    for number, trial in enumerate(trials, start=1):
        if trial.key in journal.ended:
            continue
        if until is not None and time.monotonic() > until:
            return False
        started = time.monotonic()
        failed = _outcome(trial)
        journal.add(trial, failed, time.monotonic() - started)
        if failed is not None:
            tell(f"{trial.key}: {failed}")
        if number % 100 == 0:
            tell(f"{number} trials, {sum(said is not None for _, said, _ in journal.ended.values())} failed")
    return True


def _outcome(trial: Trial) -> str | None:
    try:
        return trial.run()
    # a proof that breaks has not shown anything
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"the proof itself ended with {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"


def record(proof: Proof, journal: Journal, figures: dict | None = None) -> dict[str, object]:
    """The row as plain data. Open ones are named by their words, with how often each came.

    figures: what else was measured, by name.
    """
    ends = journal.ended.values()
    failures = Counter(f"{kind}: {said}" for kind, said, _ in ends if said is not None)
    named = [f"{words} ({count} times)" if count > 1 else words for words, count in failures.most_common(MOST_NAMED)]
    if len(failures) > MOST_NAMED:
        named.append(f"and {len(failures) - MOST_NAMED} more")
    kinds = sorted({kind for kind, _, _ in ends})
    counts = {
        kind: {
            "tried": sum(times for own, _, times in ends if own == kind),
            "failed": sum(own == kind and said is not None for own, said, _ in ends),
        }
        for kind in kinds
    }
    return {
        "item": proof.item,
        "what": proof.what,
        "tried": sum(times for _, _, times in ends),
        "failed": sum(failures.values()),
        "named": named,
        "command": proof.command,
        "seconds": round(journal.seconds),
        "processor": processor(),
        "commit": ", ".join(journal.commits),
        "counts": counts,
        **({"figures": figures} if figures else {}),
    }


def processor() -> str:
    """This machine's."""
    return machine()["processor"]


@cache
def commit() -> str:
    """Of the code that was tried: what lies in docs, such as the rows themselves, does not count as changed."""
    here = Path(__file__).parent
    asked = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)docs"])
    said = [subprocess.run(["git", *one], cwd=here, capture_output=True, text=True).stdout.strip() for one in asked]
    return said[0] + ("-dirty" if said[1] else "")


def parser_of(proof: Proof, count: int) -> argparse.ArgumentParser:
    """The options that all proofs have. count: trials by default."""
    parser = argparse.ArgumentParser(prog=proof.command.removeprefix("python -m "), description=proof.what)
    parser.add_argument("--count", type=int, default=count, help=f"trials (default: {count})")
    parser.add_argument("--minutes", type=float, help="stop after so many, and count what was tried")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier call has tried")
    parser.add_argument("--only", default="", help="the kinds whose names begin so")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the row's JSON (default: {RESULTS})")
    return parser


def main(proof: Proof, trials: Source, count: int, arguments: Sequence[str] | None = None) -> int:
    """The command of a proof. Returns 1 where a trial failed."""
    options = parser_of(proof, count).parse_args(arguments)
    journal = Journal(JOURNALS / f"{proof.name}.jsonl", options.fresh)
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    wanted = (t for t in trials(options, JOURNALS / proof.name) if t.kind.startswith(options.only))
    try:
        whole = carried_out(wanted, journal, until=until, tell=lambda text: print(text, flush=True))
    finally:
        noted = JOURNALS / proof.name / FIGURES
        row = record(proof, journal, json.loads(noted.read_text()) if noted.is_file() else None)
        write_json(options.output / f"{proof.name}.json", row)
    print(summary(row) + ("" if whole else "; time was over"), flush=True)
    return 1 if row["failed"] else 0


def summary(row: dict) -> str:
    """A row in a few lines."""
    kinds = ", ".join(f"{kind} {c['failed']} of {c['tried']}" for kind, c in row["counts"].items())
    open_ones = [f"\n  {words}" for words in row["named"]]
    return f"{row['failed']} of {row['tried']} failed ({kinds}){''.join(open_ones)}"


def run(*given) -> None:
    """`main`, and the end of the process with what it returns."""
    sys.exit(main(*given))
