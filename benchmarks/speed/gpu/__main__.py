"""Checks every path on this GPU, then times all of them beside their peers. Refuses to time what is not right.

    python -m benchmarks.speed.gpu [--minutes 8] [--quick] [--output DIR] [--only NAME ...] [--device cuda|cpu]

Needs torch >= 2.11 and triton >= 3.6, no network and no other package. --device cpu rehearses all of it in Triton's
interpreter at toy shapes. Exit status: 0 timed, 1 a check was red and nothing was timed, 2 nothing can run here.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.speed.gpu import gpu_report, gpu_rows
from benchmarks.speed.gpu.isolation import ROOT, Isolated
from benchmarks.speed.op.timed_row import TimedRow

REQUIRED = {"torch": (2, 11), "triton": (3, 6)}
OPTIONAL = {
    "matplotlib": "no picture will be drawn",
    "pytest": "the kernels' own tests, which use a GPU where there is one, cannot run here",
}
# kept for writing the report
_RESERVE = 8.0


def lacking() -> list[str]:
    """What is required and is not there, in words."""
    found = []
    for package, least in REQUIRED.items():
        wanted = ".".join(map(str, least))
        try:
            there = version(package)
        except PackageNotFoundError:
            # builds of vendors come under other names: one that can be imported is tried
            if find_spec(package) is None:
                found.append(f"{package} >= {wanted} is not installed")
            continue
        if tuple(map(int, re.findall(r"\d+", there)[:2])) < least:
            found.append(f"{package} >= {wanted} is needed, {there} is installed")
    return found


class Session:
    """One run of the script: a worker, a deadline, and what has been found so far."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.device = chosen, chosen.device
        self.started = time.monotonic()
        self.worker = Isolated(chosen.device)
        evidence = gpu_report.MEASURED if chosen.device == "cuda" else gpu_report.REHEARSED
        self.report: dict[str, Any] = {"evidence": evidence, "command": _command(chosen), "checks": {}, "rows": []}

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return 60 * self.chosen.minutes - (time.monotonic() - self.started)

    def say(self, line: str) -> None:
        """A line of progress, with the time."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {line}", flush=True)

    def peers(self) -> list[str]:
        """The names to check and time, the floor first: what the others are divided by."""
        # imported late: without torch there is a message to print first
        from benchmarks.speed.op.operators import OPERATORS

        only = self.chosen.only
        named = [name for name in OPERATORS if not only or any(part in name for part in only)]
        return ["floor", *(name for name in named if name != "floor")]

    def check(self, names: Sequence[str]) -> bool:
        """Checks every peer on every case. Returns whether all of ours are right; prints what is not."""
        from benchmarks.speed.op.operators import OPERATORS

        cases = [vars(case) for case in gpu_rows.CHECKS[self.device]]
        for name in names:
            if name == "floor":
                continue
            if self.chosen.quick and OPERATORS[name].needs == "compiler":
                self.report["checks"][name] = {"left_out": "--quick"}
                continue
            task = {"kind": "check", "peer": name, "cases": cases, "planted": name == self.chosen.plant}
            found = self.worker.run(task, gpu_rows.CHECK_SECONDS)
            self.report["checks"][name] = found | {"ours": OPERATORS[name].ours}
            self.say(f"check {name}: {_verdict(found)}")
        return not any(row.get("ours") and _is_red(row) for row in self.report["checks"].values())

    def time(self, names: Sequence[str]) -> None:
        """Times the rows in their order until the time is up."""
        checks = self.report["checks"]
        out = {name: "left out by --quick" for name in names if "left_out" in checks.get(name, {})}
        out |= {name: f"its check is red: {_verdict(checks[name])}" for name in checks if _is_red(checks[name])}
        rows = gpu_rows.ROWS[self.device]
        rows = rows[: gpu_rows.QUICK[self.device]] if self.chosen.quick else rows
        longest = 0.0
        for row in rows:
            if self.left - _RESERVE < longest:
                self.report.setdefault("not_run", []).append(vars(row) | {"reason": "out of time"})
                continue
            began = time.monotonic()
            found = self.timed_row(row, [name for name in names if name not in out])
            longest = max(longest, time.monotonic() - began)
            found["peers"] = found.get("peers", {}) | {name: {"skipped": why} for name, why in out.items()}
            self.report["rows"].append(vars(row) | found)
            self.say(gpu_report.text(self.report["rows"][-1]))
        if self.report.get("not_run"):
            self.say(f"out of time: {len(self.report['not_run'])} rows were not run, and are listed as such")

    def timed_row(self, row: TimedRow, names: list[str]) -> dict[str, Any]:
        """One row; again without a peer that took the GPU down with it."""
        fallen: dict[str, Any] = {}
        while True:
            going = [name for name in names if name not in fallen]
            task = row.task(self.device, going, gpu_rows.ROUNDS[self.device], gpu_rows.ROW_SECONDS)
            found = self.worker.run(task, max(5.0, self.left - _RESERVE))
            culprit = found.get("broken_by")
            if culprit is None or culprit not in going:
                return {"error": found["error"]} if "error" in found else {"peers": found["rows"] | fallen}
            fallen[culprit] = found["rows"][culprit]


def _is_red(found: dict[str, Any]) -> bool:
    return bool(found.get("error") or found.get("broken") or found.get("problems"))


def _verdict(found: dict[str, Any]) -> str:
    if "left_out" in found:
        return f"left out by {found['left_out']}"
    problems = found.get("problems") or [found[key] for key in ("error", "broken") if found.get(key)]
    if problems:
        return f"RED, {len(problems)} problems, the first: {problems[0]}"
    missing = "; ".join(found["missing"])
    if not found["checked"]:
        return f"cannot run here: {missing}"
    return f"right in {found['checked']} cases" + (f"; not in others: {missing}" if missing else "")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.speed.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it takes at most this long (default: 8)")
    parser.add_argument("--quick", action="store_true", help="the first few rows only, and no torch.compile")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/DEVICE; for cpu: runs/gpu)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only peers whose name contains NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, no measurement")
    parser.add_argument("--plant", metavar="NAME", help="make this path wrong by 1 %%, to see the script refuse")
    return parser.parse_args(arguments)


def _command(chosen: argparse.Namespace) -> str:
    """The command as it is recorded: without the folder, which says more about the machine than about the run."""
    words = ["python -m benchmarks.speed.gpu", f"--minutes {chosen.minutes:g}", f"--device {chosen.device}"]
    words += ["--quick"] * chosen.quick + [f"--only {name!r}" for name in chosen.only]
    return " ".join(words + ([f"--plant {chosen.plant!r}"] if chosen.plant else []))


def _folder(chosen: argparse.Namespace, device: str) -> Path:
    if chosen.output:
        return chosen.output
    measured = ROOT / "benchmarks" / "results" / gpu_report.slug(device)
    return measured if chosen.device == "cuda" else ROOT / "runs" / "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    chosen = parse_arguments(arguments)
    missing = lacking()
    if missing:
        print("cannot run here: " + "; ".join(missing), file=sys.stderr)
        return 2
    session = Session(chosen)
    if chosen.plant and chosen.plant not in session.peers():
        print(f"--plant {chosen.plant!r}: expected one of {', '.join(session.peers())}", file=sys.stderr)
        return 2
    for package, consequence in OPTIONAL.items():
        try:
            version(package)
        except PackageNotFoundError:
            session.say(f"{package} is not installed: {consequence}")
    try:
        found = session.worker.run({"kind": "machine"}, 120)
        if "error" in found:
            print(f"cannot run here: {found['error']}", file=sys.stderr)
            return 2
        session.report["machine"] = found
        session.say(f"{found['device']}, {session.report['evidence']}")
        return _run(session, _folder(chosen, found["device"]))
    finally:
        session.worker.close()


def _run(session: Session, folder: Path) -> int:
    names = session.peers()
    right = session.check(names)
    if right:
        session.time(names)
        session.report["machine_after"] = session.worker.run({"kind": "machine"}, 60)
    else:
        session.report["refused"] = "a check is red: nothing was timed"
    session.report["seconds"] = round(time.monotonic() - session.started, 1)
    session.say(f"written: {gpu_report.write(session.report, folder)}")
    if not right:
        print("REFUSED: a check is red, so nothing was timed.", file=sys.stderr)
        return 1
    session.say(gpu_report.picture(session.report, folder / "gpu.png"))
    session.say("more checks, with pytest and pytest-timeout: PYTHONPATH=kernels:. python -m pytest tests/kernels/gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
