"""One run on a device: a worker, a deadline, and what has been found so far. What is red costs its own path only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.speed.gpu import gpu_report
from benchmarks.speed.gpu.gpu_rows import Check
from benchmarks.speed.gpu.isolation import Isolated
from benchmarks.speed.op.timed_row import TimedRow

# kept for writing the report
RESERVE = 8.0
# seconds of one path's checks with all compilation
CHECK_SECONDS = 180.0
OUT_OF_TIME = "out of time"
# exit statuses
TIMED, NOTHING_TIMED, CANNOT_RUN, SOME_RED = range(4)


@dataclass(frozen=True)
class Pace:
    """How long a row may be timed: at most so many rounds, and after three of them no longer than so many seconds."""

    rounds: int
    seconds: float


class Session:
    """Checks paths and times rows with one worker until a deadline; goes on with what its report holds already.

    device: "cuda", or "cpu" for a rehearsal. minutes: from now. report: what is added to: "checks" by path, "rows" and
    "not_run". save: called whenever something was added. checks: the verdicts to go by and to add to, where the report
    is not the place for them.
    """

    def __init__(
        self,
        device: str,
        minutes: float,
        report: dict[str, Any],
        worker: Isolated,
        save: Callable[[], object] = lambda: None,
        checks: dict[str, Any] | None = None,
    ) -> None:
        self.device, self.minutes, self.worker, self.save = device, minutes, worker, save
        self.started = time.monotonic()
        self.report = report
        for key in ("rows", "not_run"):
            report.setdefault(key, [])
        self.checks = report.setdefault("checks", {}) if checks is None else checks

    @property
    def left(self) -> float:
        """Seconds until the time is up, but for what writing the report takes."""
        return 60 * self.minutes - RESERVE - (time.monotonic() - self.started)

    def say(self, line: str) -> None:
        """A line of progress, with the time."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {line}", flush=True)

    def check(
        self,
        names: Sequence[str],
        cases: Sequence[Check],
        seeds: int = 1,
        quick: bool = False,
        plant: str | None = None,
    ) -> None:
        """Checks every path and peer of these names on every case, those that have no verdict yet.

        seeds: draws of each case. quick: leave out what a compiler makes. plant: the path that is made wrong.
        """
        # imported late: without torch there is a message to print first
        from benchmarks.speed.op.operators import OPERATORS

        checks = self.checks
        for name in names:
            if name == "floor" or name in checks and checks[name].get("left_out") != OUT_OF_TIME:
                continue
            if quick and OPERATORS[name].needs == "compiler":
                checks[name] = {"left_out": "--quick"}
                continue
            if self.left <= 0:
                checks[name] = {"left_out": OUT_OF_TIME}
                continue
            task = {"kind": "check", "peer": name, "cases": [asdict(case) for case in cases], "seeds": seeds}
            found = self.worker.run(task | {"planted": name == plant}, min(seeds * CHECK_SECONDS, self.left))
            checks[name] = found | {"ours": OPERATORS[name].ours}
            self.say(f"check {name}: {verdict(checks[name])}")
            self.save()

    def time(self, names: Sequence[str], rows: Sequence[TimedRow], pace: Pace) -> None:
        """Times the rows that the report lacks, in their order, until the time is up.

        names: the floor first, which the others are divided by. Who is not known to be right is left out of every row,
        with the reason.
        """
        out = left_out(names, self.checks)
        known = {key(row) for row in self.report["rows"]}
        self.report["not_run"], longest = [], 0.0
        for row in rows:
            if key(vars(row)) in known:
                continue
            if self.left < longest or self.left <= 0:
                self.report["not_run"].append(vars(row) | {"reason": OUT_OF_TIME})
                continue
            began = time.monotonic()
            found = self.timed_row(row, [name for name in names if name not in out], pace)
            longest = max(longest, time.monotonic() - began)
            found["peers"] = found.get("peers", {}) | {name: {"skipped": why} for name, why in out.items()}
            self.report["rows"].append(vars(row) | found)
            self.say(gpu_report.text(self.report["rows"][-1]))
            self.save()
        if self.report["not_run"]:
            self.say(f"{OUT_OF_TIME}: {len(self.report['not_run'])} rows were not run, and are listed as such")

    def timed_row(self, row: TimedRow, names: list[str], pace: Pace) -> dict[str, Any]:
        """One row; again without a peer that took the GPU or the process down with it, or hung."""
        fallen: dict[str, Any] = {}
        while True:
            going = [name for name in names if name not in fallen]
            task = row.task(self.device, going, pace.rounds, pace.seconds)
            found = self.worker.run(task, max(5.0, self.left))
            culprit = found.get("broken_by") or found.get("at")
            # without the floor there is nothing to divide by
            if culprit not in going or culprit == "floor":
                return {"error": found["error"]} if "error" in found else {"peers": found["rows"] | fallen}
            fallen[culprit] = found.get("rows", {}).get(culprit) or {"error": found["error"]}
            if self.left <= 0:
                return {"error": f"{OUT_OF_TIME}, after {culprit}: {fallen[culprit]['error']}", "peers": fallen}

    def status(self, timing: bool = True) -> int:
        """The exit status: TIMED, NOTHING_TIMED or SOME_RED. timing: False where nothing was to be timed."""
        if not timing:
            return SOME_RED if reds(self.checks) else TIMED
        peers = [
            found for row in self.report["rows"] for name, found in row.get("peers", {}).items() if name != "floor"
        ]
        if not any("ms" in found for found in peers):
            return NOTHING_TIMED
        return SOME_RED if reds(self.checks) or any("error" in found for found in peers) else TIMED


def key(row: dict[str, Any]) -> tuple:
    """What makes a row the row it is."""
    return tuple(row[name] for name in ("level", "model", "setting", "T", "dtype"))


def peers(only: Sequence[str] = ()) -> list[str]:
    """The names to check and time, the floor first. only: parts of names, those of all where it is empty."""
    from benchmarks.speed.op.operators import OPERATORS

    named = [name for name in OPERATORS if not only or any(part in name for part in only)]
    return ["floor", *(name for name in named if name != "floor")]


def reds(checks: dict[str, Any]) -> dict[str, str]:
    """By path or peer, what its check found wrong, in a line; those that are right are not in it."""
    return {name: verdict(found) for name, found in checks.items() if _problems(found)}


def left_out(names: Sequence[str], checks: dict[str, Any]) -> dict[str, str]:
    """Who of these is not to be timed, and why: whoever is red, and whoever was not looked at."""
    wrong = reds(checks)
    out = {name: f"its check is red: {wrong[name]}" for name in names if name in wrong}
    unseen = (name for name in names if name != "floor" and "left_out" in checks.get(name, {"left_out": ""}))
    return out | {name: verdict(checks.get(name, {"left_out": "it was not checked"})) for name in unseen}


def verdict(found: dict[str, Any]) -> str:
    """What a check found, in a line."""
    if "left_out" in found:
        return f"left out: {found['left_out']}"
    if problems := _problems(found):
        return f"RED, {len(problems)} problems, the first: {problems[0]}"
    missing = "; ".join(found["missing"])
    if not found["checked"]:
        return f"cannot run here: {missing}"
    return f"right in {found['checked']} cases" + (f"; not in others: {missing}" if missing else "")


def _problems(found: dict[str, Any]) -> list[str]:
    if found.get("problems"):
        return found["problems"]
    at = f" at {found['at']}" if found.get("at") else ""
    return [f"{found[key]}{at}" for key in ("error", "broken") if found.get(key)]
