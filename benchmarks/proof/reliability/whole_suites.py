"""Rows of docs/reliability.md that are the whole suite, on the oldest and on the newest versions of other libraries.

python -m benchmarks.proof.reliability.whole_suites oldest|newest --python PYTHON REPORT ...

A report is what `pytest --junitxml` writes; `make test-oldest` and `make test-newest` do. Of a file of tests in two
reports the later one counts: files that were run again after they were mended need not be a whole run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.proof.reliability.reliability_page import RESULTS
from benchmarks.proof.reliability.trial_journal import MOST_NAMED, commit, processor
from lofit_fast.files import write_json

# what the versions of a run are the versions of, where it is installed
LIBRARIES = ("torch", "triton", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
LIBRARIES += ("datasets", "peft", "trl", "torchao", "bitsandbytes")
_ASKED = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"Python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Suite:
    """what: is run. command: that runs it again."""

    what: str
    command: str


SUITES = {
    "oldest": Suite(
        "the whole suite on the oldest supported versions, without the optional packages", "make test-oldest"
    ),
    "newest": Suite("the whole suite on the newest versions that could be installed", "make test-newest"),
}


@dataclass(frozen=True)
class Outcome:
    """Of one test. why: it was skipped or failed."""

    kind: str
    why: str
    seconds: float


def outcomes(reports: Sequence[Path]) -> dict[str, Outcome]:
    """Test -> what came of it in the last of the reports that has its file."""
    files: dict[str, dict[str, Outcome]] = {}
    for report in reports:
        here: dict[str, dict[str, Outcome]] = {}
        for case in xml.parse(report).getroot().iter("testcase"):
            # a file that could not be read, or was skipped whole, has no class
            file, name = case.get("classname") or case.get("name") or "", case.get("name") or ""
            here.setdefault(file, {})[file if file == name else f"{file}.{name}"] = _outcome(case)
        files |= here
    return {test: outcome for file in files.values() for test, outcome in file.items()}


def _outcome(case: xml.Element) -> Outcome:
    seconds = float(case.get("time", 0))
    for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (said := case.find(tag)) is not None:
            return Outcome(kind, said.get("message") or "", seconds)
    return Outcome("passed", "", seconds)


def versions(python: str) -> dict[str, str]:
    """Python's, and those of LIBRARIES that it has."""
    asked = subprocess.run([python, "-c", _ASKED, *LIBRARIES], capture_output=True, text=True, check=True)
    return json.loads(asked.stdout)


def row_of(name: str, found: dict[str, Outcome], used: dict[str, str], commits: str) -> dict[str, object]:
    """The row. Tests that were skipped have not been tried; how many those are is a figure of it.

    Raises ValueError where there is no test.
    """
    if not found:
        raise ValueError(f"{name}: got reports without a test")
    kinds = Counter(outcome.kind for outcome in found.values())
    failed = [test for test, outcome in found.items() if outcome.kind == "failed"]
    named = failed[:MOST_NAMED] + ([f"and {len(failed) - MOST_NAMED} more"] if len(failed) > MOST_NAMED else [])
    suite, tried = SUITES[name], kinds["passed"] + kinds["failed"]
    return {
        "item": 8,
        "what": f"{suite.what}: {', '.join(' '.join(pair) for pair in used.items())}",
        "tried": tried,
        "failed": len(failed),
        "named": named,
        "command": suite.command,
        "seconds": round(sum(outcome.seconds for outcome in found.values())),
        "processor": processor(),
        "commit": commits,
        "counts": {f"the suite on the {name} versions": {"tried": tried, "failed": len(failed)}},
        "figures": {f"tests skipped on the {name} versions, each with its reason": kinds["skipped"]},
        "versions": used,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(SUITES))
    parser.add_argument("reports", nargs="+", type=Path, help="what pytest --junitxml has written; later ones count")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that ran the tests")
    parser.add_argument("--commits", default=commit(), help="of the code that was tested (default: this one)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the row's JSON (default: {RESULTS})")
    chosen = parser.parse_args(arguments)
    found = outcomes(chosen.reports)
    row = row_of(chosen.name, found, versions(chosen.python), chosen.commits)
    if len(chosen.reports) > 1:
        row["what"] = f"{row['what']}; files that failed in the whole run were run again after they were mended"
    write_json(chosen.output / f"{chosen.name}.json", row)
    for why, times in Counter(outcome.why for outcome in found.values() if outcome.kind == "skipped").most_common():
        print(f"skipped {times}: {why}")
    print(f"{row['failed']} of {row['tried']} failed")
    return 1 if row["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
