"""Checks every path on this GPU, then times those that are right beside their peers.

    python -m benchmarks.speed.gpu [--minutes 8] [--quick] [--output DIR] [--only NAME ...] [--device cuda|cpu]
                                   [--seeds N] [--checks-only]

Needs torch >= 2.11 and triton >= 3.6, no network and no other package. --device cpu rehearses all of it in Triton's
interpreter at toy shapes. Exit status: 0 all checks are right, and what was to be timed was; 3 something was timed, and
what is red, crashed or hung was left out; 1 nothing was timed; 2 nothing can run here.
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
from benchmarks.speed.gpu.gpu_session import CANNOT_RUN, NOTHING_TIMED, Pace, Session, peers, reds
from benchmarks.speed.gpu.isolation import ROOT, Isolated

REQUIRED = {"torch": (2, 11), "triton": (3, 6)}
OPTIONAL = {
    "matplotlib": "no picture will be drawn",
    "pytest": "the kernels' own tests, which use a GPU where there is one, cannot run here",
}


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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.speed.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it takes at most this long (default: 8)")
    parser.add_argument("--quick", action="store_true", help="the first few rows only, and no torch.compile")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/DEVICE; for cpu: runs/gpu)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only peers whose name contains NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, no measurement")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="check each case on N draws (default: 1)")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--plant", metavar="NAME", help="make this path wrong by 1 %%, to see what becomes of it")
    return parser.parse_args(arguments)


def _command(chosen: argparse.Namespace) -> str:
    """The command as it is recorded: without the folder, which says more about the machine than about the run."""
    words = ["python -m benchmarks.speed.gpu", f"--minutes {chosen.minutes:g}", f"--device {chosen.device}"]
    words += ["--quick"] * chosen.quick + [f"--only {name!r}" for name in chosen.only]
    words += [f"--seeds {chosen.seeds}"] * (chosen.seeds != 1) + ["--checks-only"] * chosen.checks_only
    return " ".join(words + ([f"--plant {chosen.plant!r}"] if chosen.plant else []))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    chosen = parse_arguments(arguments)
    missing = lacking()
    if missing:
        print("cannot run here: " + "; ".join(missing), file=sys.stderr)
        return CANNOT_RUN
    names = peers(chosen.only)
    if chosen.plant and chosen.plant not in names:
        print(f"--plant {chosen.plant!r}: expected one of {', '.join(names)}", file=sys.stderr)
        return CANNOT_RUN
    evidence = gpu_report.MEASURED if chosen.device == "cuda" else gpu_report.REHEARSED
    report: dict[str, Any] = {"evidence": evidence, "command": _command(chosen)}
    session = Session(chosen.device, chosen.minutes, report, Isolated(chosen.device))
    say_what_is_absent(OPTIONAL, session.say)
    try:
        found = session.worker.run({"kind": "machine"}, 120)
        if "error" in found:
            print(f"cannot run here: {found['error']}", file=sys.stderr)
            return CANNOT_RUN
        report["machine"] = found
        session.say(f"{found['device']}, {evidence}")
        return _run(session, chosen, names, _folder(chosen, found["device"]))
    finally:
        session.worker.close()


def say_what_is_absent(optional: dict[str, str], say: Any) -> None:
    """Names each of these packages that is not installed, with the consequence."""
    for package, consequence in optional.items():
        if find_spec(package) is None:
            say(f"{package} is not installed: {consequence}")


def _folder(chosen: argparse.Namespace, device: str) -> Path:
    if chosen.output:
        return chosen.output
    measured = ROOT / "benchmarks" / "results" / gpu_report.slug(device)
    return measured if chosen.device == "cuda" else ROOT / "runs" / "gpu"


def _run(session: Session, chosen: argparse.Namespace, names: Sequence[str], folder: Path) -> int:
    report, device = session.report, session.device
    session.check(names, gpu_rows.CHECKS[device], chosen.seeds, chosen.quick, chosen.plant)
    if not chosen.checks_only:
        rows = gpu_rows.ROWS[device]
        rows = rows[: gpu_rows.QUICK[device]] if chosen.quick else rows
        session.time(names, rows, Pace(gpu_rows.ROUNDS[device], gpu_rows.ROW_SECONDS))
    report["machine_after"] = session.worker.run({"kind": "machine"}, 60)
    report["seconds"] = round(time.monotonic() - session.started, 1)
    wrong, status = reds(report["checks"]), session.status(timing=not chosen.checks_only)
    report["red"] = wrong
    session.say(f"written: {gpu_report.write(report, folder)}")
    for name, why in wrong.items():
        print(f"NOT TIMED, its check is red: {name}: {why}", file=sys.stderr)
    if status == NOTHING_TIMED:
        print("REFUSED: nothing was timed.", file=sys.stderr)
        return status
    session.say(gpu_report.picture(report, folder / "gpu.png"))
    session.say("more checks, with pytest and pytest-timeout: PYTHONPATH=kernels:. python -m pytest tests/kernels/gpu")
    return status


if __name__ == "__main__":
    sys.exit(main())
