"""Rows of docs/reliability.md that are tests: they are run, and counted.

python -m benchmarks.proof.reliability.tested_rows NAME [--python PYTHON]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.proof.reliability.reliability_page import RESULTS
from benchmarks.proof.reliability.trial_journal import commit, processor
from lofit_fast.files import write_json


@dataclass(frozen=True)
class Tested:
    """One row. item: its number. what: is tried. tests: files, and options of pytest. command: that runs it in full."""

    item: int
    what: str
    tests: tuple[str, ...]
    command: str | None = None


ROWS: dict[str, Tested] = {
    "wrong_numbers": Tested(
        5,
        "tests: a loss, gradient or vector that is not finite stops a run, which names the step and its examples and "
        "goes on at another rate; `--verify` finds a wrong product; a loss at chance is said",
        ("tests/training/test_finite_steps.py", "tests/training/test_loss_sense.py")
        + ("tests/training/test_verify_steps.py",),
    ),
    "old_and_new": Tested(
        8,
        "tests: adapters of every released format version load, floors are the oldest versions that are run, our own "
        "deprecated calls are errors; `make test-oldest` and `make test-newest` run the whole suite",
        ("tests/patching/test_older_adapters.py", "tests/test_floors.py", "tests/test_deprecations.py"),
    ),
    "supply_chain": Tested(
        9,
        "tests: a wheel built twice is the same bytes, what is imported is declared, nothing of a base, adapter or "
        "checkpoint is executed",
        ("tests/test_wheel.py", "tests/test_dependencies.py", "tests/models/test_nothing_runs.py")
        + ("tests/training/test_planted_pickles.py",),
    ),
}


def row_of(name: str, python: str = sys.executable) -> dict[str, object]:
    """Run the tests of a row. Returns the row; tests that are skipped have not been tried."""
    row, started = ROWS[name], time.monotonic()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", *row.tests, f"--junitxml={report}"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        cases = list(xml.parse(report).getroot().iter("testcase"))
    tried = [case for case in cases if case.find("skipped") is None]
    failed = [case for case in tried if case.find("failure") is not None or case.find("error") is not None]
    return {
        "item": row.item,
        "what": row.what,
        "tried": len(tried),
        "failed": len(failed),
        "named": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "command": row.command or f"python -m pytest {' '.join(row.tests)}",
        "seconds": round(time.monotonic() - started),
        "processor": processor(),
        "commit": commit(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(ROWS))
    parser.add_argument("--python", default=sys.executable, help="the interpreter of another environment")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the row's JSON (default: {RESULTS})")
    chosen = parser.parse_args(arguments)
    row = row_of(chosen.name, chosen.python)
    write_json(chosen.output / f"{chosen.name}.json", row)
    print(f"{row['failed']} of {row['tried']} failed")
    return 1 if row["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
