"""The parts of the hour with a GPU: each goes on with what its data holds, and says whether it is finished.

A part is a function of a `Turn`. What a crash, a hang or a red check takes is one path, peer or row, never a part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.speed.gpu import gpu_rows, hour_rows
from benchmarks.speed.gpu.gpu_session import OUT_OF_TIME, Session, peers
from benchmarks.speed.gpu.isolation import ROOT, Isolated

# of a whole model's task: building and checking it compile and allocate without a word
_SILENCE = 150.0
# seconds that a task of a whole model needs to be worth beginning
_LEAST = {"cuda": 150.0, "cpu": 10.0}


@dataclass
class Turn:
    """A part's turn at the device.

    data: what the part has found so far, plain data. checks: the verdicts of part "checks", which timing goes by. only:
    as for `gpu_session.peers`. save: called whenever something was added.
    """

    device: str
    minutes: float
    data: dict[str, Any]
    checks: dict[str, Any]
    worker: Isolated
    save: Callable[[], object]
    only: tuple[str, ...] = ()

    def session(self) -> Session:
        """A session over this part's rows, by the verdicts of all."""
        return Session(self.device, self.minutes, self.data, self.worker, self.save, self.checks)


def checks(turn: Turn) -> bool:
    """Every path and peer against float64."""
    session = turn.session()
    session.check(peers(turn.only), gpu_rows.CHECKS[turn.device])
    return all(found.get("left_out") != OUT_OF_TIME for found in turn.checks.values())


def timed(part: str) -> Callable[[Turn], bool]:
    """The part that times the rows of `hour_rows.timed_rows`."""

    def run(turn: Turn) -> bool:
        session = turn.session()
        names = [name for name in peers(turn.only) if name in hour_rows.PEERS or _is_ours(name)]
        if part == "layer":
            names = [name for name in names if name in ("ours", *hour_rows.PEERS)]
        # part "checks" may not have been run: nobody is timed unchecked
        session.check(names, gpu_rows.CHECKS[turn.device])
        session.time(names, hour_rows.timed_rows(part, turn.device), hour_rows.PACE[turn.device])
        return not turn.data["not_run"]

    return run


def _is_ours(name: str) -> bool:
    from benchmarks.speed.op.operators import OPERATORS

    return OPERATORS[name].ours


def whole(kind: str, rows: tuple[tuple[str, str], ...]) -> Callable[[Turn], bool]:
    """The part that times ("steps") or profiles ("trace") whole training steps of the models in `rows`."""

    def run(turn: Turn) -> bool:
        session = turn.session()
        groups = turn.data.setdefault("groups", {})
        for model, step in rows:
            name = f"{model}, {step}"
            if name in groups:
                continue
            if session.left < _LEAST[turn.device]:
                session.say(f"{OUT_OF_TIME}: {name} was not run")
                return False
            task = {"kind": kind, "model": model, "step": step, **hour_rows.STEP_PACE[turn.device]}
            found = _without_the_fallen(session, task)
            if "error" in found and session.left <= 0:
                session.say(f"{OUT_OF_TIME}: {name}: {found['error']}")
                return False
            groups[name] = {"model": model, "step": step, **found}
            session.say(_said(name, found))
            turn.save()
        return True

    return run


def _without_the_fallen(session: Session, task: dict[str, Any]) -> dict[str, Any]:
    """The task's answer; again without a row that took the process down, or hung, as long as there is time."""
    fallen: dict[str, Any] = {}
    while True:
        found = session.worker.run(task | {"without": fallen}, max(5.0, session.left), _SILENCE)
        culprit = found.get("at")
        if "error" not in found or culprit is None or ", " not in culprit or session.left <= 0:
            return found | ({"fallen": fallen} if fallen else {})
        fallen[culprit] = f"{found['error']}"


def _said(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name}: {found['error']}"
    lines = [f"{name}, {found['layers']} layers"]
    for row in found["rows"]:
        who = f"{row['peer']}, {row['setting']}"
        why = next((f"{key}: {row[key]}" for key in ("absent", "skipped", "error", "red") if key in row), None)
        if why is None and "ms_per_round" in row:
            why = f"{row['ms_per_round']:9.1f} ms a round, {row['tokens_per_s']:9.0f} tokens/s"
        if why is None:
            counts = {key: row[key] for key in ("kernels", "launches", "synchronisations", "operations")}
            why = ", ".join(f"{value:.0f} {key}" for key, value in counts.items() if value is not None)
        lines.append(f"  {who:28} {why}")
    return "\n".join(lines + [f"  {who:28} fell: {why}" for who, why in found.get("fallen", {}).items()])


def answers(turn: Turn) -> bool:
    """What autotune finds here for the shapes of `hour_rows.TUNED`."""
    session, cases = turn.session(), turn.data.setdefault("cases", {})
    for model, T, share in hour_rows.TUNED[turn.device]:
        name = f"{model} T={T} share={share:g}"
        if name in cases:
            continue
        if session.left < 5:
            session.say(f"{OUT_OF_TIME}: {name} was not run")
            return False
        task = {"kind": "answers", "model": model, "T": T, "share": share, "dtype": "bfloat16"}
        cases[name] = session.worker.run(task, session.left)
        chosen = cases[name].get("row", {}).get("path", cases[name].get("error"))
        session.say(f"autotune {name}: {chosen}")
        turn.save()
    return True


def gpu_tests(turn: Turn) -> bool:
    """The kernels' own tests and all that are marked "gpu", with pytest where it is installed."""
    session = turn.session()
    try:
        import pytest  # noqa: F401
    except ImportError:
        turn.data["absent"] = "pytest is not installed: no test was run"
        session.say(turn.data["absent"])
        return True
    files = ["tests/kernels/gpu", "tests/training/test_cost.py"] if turn.device == "cuda" else [_REHEARSED]
    with tempfile.TemporaryDirectory() as folder:
        report, began = Path(folder) / "tests.xml", time.monotonic()
        # without the project's own options, which need plugins
        command = [sys.executable, "-m", "pytest", *files, "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", f"--junitxml={report}"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=max(5.0, session.left)
            )
        except subprocess.TimeoutExpired:
            session.say(f"{OUT_OF_TIME}: the tests were not over")
            return False
        turn.data |= {"status": done.returncode, "seconds": round(time.monotonic() - began, 1), "files": files}
        turn.data |= _outcomes(report) if report.exists() else {"said": (done.stdout + done.stderr)[-2000:]}
    session.say(f"tests: {turn.data.get('counts', turn.data.get('said'))}")
    return True


# one quick file of the kernels' tests
_REHEARSED = "tests/kernels/test_error_bound.py"


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _outcomes(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and what failed first."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped") for case in cases]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    words = [next(iter(case)).get("message", "")[:200] for case in bad]
    return {
        "counts": {"tests": len(cases), "failed": len(bad), "skipped": sum(one is not None for one in skipped)},
        "failed": [f"{name}: {said}" for name, said in list(zip(names, words, strict=True))[:40]],
        "skipped": sorted({one.get("message", "") for one in skipped if one is not None})[:20],
    }


@dataclass(frozen=True)
class Part:
    """A row of PARTS: what it does, in words; the function; and its minutes, below the nine that a command may last."""

    title: str
    run: Callable[[Turn], bool]
    minutes: float


PARTS: dict[str, Part] = {
    "checks": Part("every path and peer against float64", checks, 5.0),
    "op": Part("one projection in steps 1 and 2: all paths, hook, compiled hook, floor", timed("op"), 8.5),
    "layer": Part("one decoder layer", timed("layer"), 6.0),
    "steps": Part("whole training steps beside the hook and LoRA", whole("steps", hour_rows.STEPS), 8.5),
    "profile": Part("launches, waits and idle gaps of a step", whole("trace", hour_rows.TRACED), 5.0),
    "autotune": Part("what autotune answers on this device", answers, 5.0),
    "tests": Part("the kernels' own tests", gpu_tests, 8.5),
    "op-more": Part("one projection with both components, and with few scales", timed("op-more"), 8.5),
}
