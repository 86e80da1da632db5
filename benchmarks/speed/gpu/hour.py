"""The hour with a GPU, scripted: checks, projections, layers, whole steps, a profile, autotune, tests, a summary.

    python -m benchmarks.speed.gpu.hour --output DIR [--part NAME ...] [--minutes M] [--only NAME ...]
                                        [--device cuda|cpu]

The parts run in the order of `hour_parts.PARTS`, each in its own minutes. A finished part is not run again; one that
was interrupted or ran out of time goes on where it was. All is in DIR: hour.json, which every row is added to as soon
as it is there, summary.md and summary.json, and answers.json for lofit_kernels. Needs torch >= 2.11, triton >= 3.6
and, for whole steps, transformers. --device cpu rehearses everything at toy shapes.
Exit status: 0 the parts asked for are finished and all is right; 3 something is red, fell or failed; 4 a part is not
finished: the same command goes on with it; 2 nothing can run here, or DIR holds the results of something else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.gpu import gpu_report, hour_summary
from benchmarks.speed.gpu.__main__ import lacking, say_what_is_absent
from benchmarks.speed.gpu.gpu_session import CANNOT_RUN, SOME_RED, TIMED
from benchmarks.speed.gpu.hour_parts import PARTS, Turn
from benchmarks.speed.gpu.isolation import Isolated

UNFINISHED = 4
# the longest that a part may last, in minutes
LONGEST = 9.0
OPTIONAL = {
    "transformers": "parts steps and profile cannot run",
    "peft": "the rows of LoRA are absent",
    "pytest": "part tests cannot run",
}
# results of one run come from one machine, with one set of versions and one commit
_SAME = ("device", "versions", "commit")


class Folder:
    """The output folder: what is known, and how it is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / "hour.json"
        self.report: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"parts": {}}

    def save(self) -> None:
        """Replaces hour.json, whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".new")
        scratch.write_text(json.dumps(self.report, indent=1) + "\n")
        scratch.replace(self.file)

    def refusal(self, machine: dict[str, Any]) -> str | None:
        """Why results of this machine cannot be added to what is there, None when they can."""
        before = self.report.get("machine", machine)
        other = [name for name in _SAME if before.get(name) != machine.get(name)]
        if not other:
            return None
        differs = "; ".join(f"{name}: {before.get(name)} there, {machine.get(name)} here" for name in other)
        return f"{self.path} holds the results of another run ({differs}): choose another --output"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.speed.gpu.hour", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=LONGEST, help="of each part at most (default: its own)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, no measurement")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only paths whose name contains NAME")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    chosen = parse_arguments(arguments)
    folder, worker, began = Folder(chosen.output), Isolated(chosen.device), time.monotonic()
    try:
        missing = lacking()
        machine = {"error": "; ".join(missing)} if missing else worker.run({"kind": "machine"}, 120)
        refusal = machine.get("error") or folder.refusal(machine)
        if refusal:
            print(f"cannot run here: {refusal}", file=sys.stderr)
            return CANNOT_RUN
        evidence = gpu_report.MEASURED if chosen.device == "cuda" else gpu_report.REHEARSED
        folder.report |= {"machine": machine, "evidence": evidence}
        say_what_is_absent(OPTIONAL, print)
        for name in chosen.part:
            _run(name, folder, worker, chosen)
    finally:
        worker.close()
        if folder.report["parts"]:
            folder.save()
            print(hour_summary.write(folder.report, folder.path))
    print(f"{time.monotonic() - began:.0f} s in all; {folder.path}")
    return status(folder.report, chosen.part)


def _run(name: str, folder: Folder, worker: Isolated, chosen: argparse.Namespace) -> None:
    """One part, unless it is finished."""
    parts, part = folder.report["parts"], PARTS[name]
    data = parts.setdefault(name, {"finished": False, "seconds": 0.0})
    if data["finished"]:
        print(f"== {name}: finished before")
        return
    minutes = min(chosen.minutes, part.minutes)
    print(f"== {name}: {part.title}, at most {minutes:g} minutes", flush=True)
    verdicts = folder.report.setdefault("checks", {})
    began, save = time.monotonic(), folder.save
    turn = Turn(chosen.device, minutes, data, verdicts, worker, save, tuple(chosen.only))
    try:
        data["finished"] = part.run(turn)
    finally:
        data["seconds"] += round(time.monotonic() - began, 1)
        folder.save()


def status(report: dict[str, Any], names: Sequence[str]) -> int:
    """The exit status of these parts."""
    if any(not report["parts"].get(name, {}).get("finished") for name in names):
        return UNFINISHED
    return SOME_RED if hour_summary.faults(report) else TIMED


if __name__ == "__main__":
    sys.exit(main())
