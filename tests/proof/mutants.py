"""Plants mechanical faults in every kernel and shows that the cases of its family notice.

    python -m tests.proof.mutants [--family NAME ...] [--kernel NAME ...] [--operator NAME ...]
                                  [--limit N | --all] [--jobs N] [--json FILE] [--list]

Without --all it takes 100 mutants of each family, the same every time, spread over all its bodies and operators.

Each mutant is a copy of `lofit_kernels` with one node of one jit body changed (see operators.py). A process of its own
loads it and runs the cases of the families that use the body in Triton's interpreter, under the memory checker, until
one fails: killed. What survives must have its reason in survivors.toml. The exit status is 1 for a survivor without a
reason, for a reason without a survivor, and when the unchanged kernels fail.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from tests.proof.bodies import PACKAGE, SUITES, Mutant, mutants, suites
from tests.proof.mutation_operators import OPERATORS

TABLE = SUITES / "survivors.toml"
# seconds; the cases of a family take some ten
PATIENCE = 180
# mutants of each family, unless told otherwise: minutes rather than the better part of an hour
SAMPLE = 100
SURVIVED = "survived"
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: `how` is one of numbers, memory, crash, signal, time, or "survived"."""

    mutant: Mutant
    how: str
    case: str = ""


def reasons(path: Path = TABLE) -> dict[Key, str]:
    """Survivor -> why it survives. Raises ValueError for one that is listed twice or without a reason."""
    found: dict[Key, str] = {}
    for entry in tomllib.loads(path.read_text())["survivors"]:
        for operator, line, becomes in entry["mutants"]:
            key = (entry["kernel"], operator, line, becomes)
            if key in found or not entry["reason"].strip():
                raise ValueError(f"{path.name}: {key} is listed twice or has no reason")
            found[key] = entry["reason"]
    return found


def select(everything: Sequence[Mutant], families: Sequence[str], limit: int | None) -> list[Mutant]:
    """The mutants of these families; at most `limit` for each, spread evenly over bodies and operators."""
    chosen: dict[int, Mutant] = {}
    for family in families or suites():
        own = [(number, mutant) for number, mutant in enumerate(everything) if family in mutant.families]
        seen: Counter[tuple[str, str]] = Counter()
        ranked = []
        for number, mutant in own:
            place = (mutant.kernel, mutant.operator)
            # scattered within its group by a fixed step, so that a few of many are not the first lines only
            ranked.append(((seen[place] * 7919) % 101, number))
            seen[place] += 1
        for _, number in sorted(ranked)[:limit]:
            chosen[number] = everything[number]
    return [chosen[number] for number in sorted(chosen)]


def _how(error: BaseException) -> str:
    from tests.proof.watch import Fault

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Fault):
            return "memory"
        inner = cause.__cause__ or cause.__context__
        if inner is None:
            return "numbers" if isinstance(cause, AssertionError) else "crash"
        cause = inner
    return "crash"


def _run(folder: str, families: Sequence[str], answer: connection.Connection) -> None:
    """In a process of its own: runs the cases against the package in `folder`, and answers (how, case)."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    sys.path.insert(0, folder)
    name = ""
    try:
        for family in families:
            for suite in suites()[family]:
                cases = importlib.import_module(f"tests.proof.{suite}").CASES
                assert Path(sys.modules["lofit_kernels"].__file__).is_relative_to(folder)
                for case in cases:
                    name = f"{family}: {case.name}"
                    case.run()
        answer.send((SURVIVED, ""))
    except BaseException as error:
        # whatever it is, it tells the mutant from the kernel
        answer.send((_how(error), name))
    finally:
        os._exit(0)


def _plant(folder: Path, mutant: Mutant | None) -> None:
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        (folder / PACKAGE.name / "gpu" / f"{mutant.module.name}.py").write_text(mutant.source())


@dataclass
class _Worker:
    mutant: Mutant | None
    folder: str
    process: Any
    answer: connection.Connection
    started: float


def _start(mutant: Mutant | None, families: Sequence[str], room: Path) -> _Worker:
    folder = tempfile.mkdtemp(dir=room)
    _plant(Path(folder), mutant)
    # fork: torch and triton are loaded once, here; nothing of ours is, so that each child loads its own copy
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(folder, families, send), daemon=True)
    process.start()
    send.close()
    return _Worker(mutant, folder, process, receive, time.monotonic())


def _finish(worker: _Worker) -> tuple[str, str] | None:
    """(how, case) when the worker is done or out of time, else None."""
    late = time.monotonic() - worker.started > PATIENCE
    if not worker.answer.poll() and not late and worker.process.is_alive():
        return None
    try:
        result = worker.answer.recv() if worker.answer.poll() else ("time" if late else "signal", "")
    except EOFError:
        result = ("signal", "")
    worker.process.kill()
    worker.process.join()
    shutil.rmtree(worker.folder, ignore_errors=True)
    return result


def _prepare() -> None:
    """Loads what all children share. Raises RuntimeError when our own package is loaded already."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.dont_write_bytecode = True
    import torch
    import triton

    # threads do not survive a fork
    torch.set_num_threads(1)
    importlib.import_module("tests.quick_interpreter").install()
    if not triton.knobs.runtime.interpret or "lofit_kernels" in sys.modules:
        raise RuntimeError("mutants need a process of their own, that interprets Triton from the start")


def run(chosen: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """Outcomes as they come in, `jobs` at a time."""
    _prepare()
    waiting, working = list(chosen)[::-1], []
    with tempfile.TemporaryDirectory() as room:
        while waiting or working:
            while waiting and len(working) < jobs:
                mutant = waiting.pop()
                working.append(_start(mutant, mutant.families, Path(room)))
            connection.wait([worker.answer for worker in working], timeout=5)
            for worker in list(working):
                done = _finish(worker)
                if done is not None:
                    working.remove(worker)
                    yield Outcome(worker.mutant, *done)


def check_unchanged(families: Sequence[str]) -> str | None:
    """None when all cases of these families pass on the kernels as they are, else the case that does not."""
    _prepare()
    with tempfile.TemporaryDirectory() as room:
        worker = _start(None, families, Path(room))
        while (done := _finish(worker)) is None:
            connection.wait([worker.answer], timeout=5)
    return None if done[0] == SURVIVED else f"{done[1]} ({done[0]})"


@dataclass
class Report:
    """The outcomes of a run, and what the table of reasons makes of them."""

    outcomes: list[Outcome]
    explained: dict[Key, str]
    everything: Sequence[Mutant]

    @property
    def survivors(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.how == SURVIVED]

    @property
    def unexplained(self) -> list[Outcome]:
        return [outcome for outcome in self.survivors if outcome.mutant.key not in self.explained]

    @property
    def stale(self) -> list[Key]:
        """Reasons whose mutant is killed, or does not exist any more."""
        killed = {outcome.mutant.key for outcome in self.outcomes if outcome.how != SURVIVED}
        killed -= {outcome.mutant.key for outcome in self.survivors}
        there = {mutant.key for mutant in self.everything}
        return [key for key in self.explained if key in killed or key not in there]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each family: how many mutants there are, how many ran, were killed, and by what."""
        table = []
        for family in suites():
            own = [outcome for outcome in self.outcomes if family in outcome.mutant.families]
            if own:
                killed = Counter(outcome.how for outcome in own if outcome.how != SURVIVED)
                there = sum(family in mutant.families for mutant in self.everything)
                counts = {"mutants": there, "run": len(own), "killed": killed.total()}
                unexplained = sum(family in outcome.mutant.families for outcome in self.unexplained)
                counts |= {"survived": len(own) - killed.total(), "unexplained": unexplained}
                table.append({"family": family, **counts, "by": dict(sorted(killed.items()))})
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        survivors = [
            {
                "kernel": o.mutant.kernel,
                "operator": o.mutant.operator,
                "line": o.mutant.line,
                "becomes": o.mutant.becomes,
                "reason": self.explained.get(o.mutant.key),
            }
            for o in self.survivors
        ]
        by_operator = Counter((o.mutant.operator, o.how == SURVIVED) for o in self.outcomes)
        operators = {
            name: {"run": by_operator[name, True] + by_operator[name, False], "survived": by_operator[name, True]}
            for name in sorted({name for name, _ in by_operator})
        }
        run, survived = len(self.outcomes), len(self.survivors)
        distinct = {"mutants": len(self.everything), "run": run, "killed": run - survived, "survived": survived}
        return {"distinct": distinct, "families": self.rows(), "operators": operators, "survivors": survivors}


def show(report: Report) -> None:
    """Prints totals, every survivor with its reason, and the reasons that no survivor needs."""
    for row in report.rows():
        how = ", ".join(f"{kind} {count}" for kind, count in row["by"].items())
        ran = f"{row['run']} of {row['mutants']} mutants run"
        print(f"{row['family']}: {ran}, {row['killed']} killed ({how}), {row['survived']} survived")
    survived = len(report.survivors)
    ran, killed = f"{len(report.outcomes)} of {len(report.everything)}", len(report.outcomes) - survived
    print(f"all, shared bodies once: {ran} mutants run, {killed} killed, {survived} survived")
    for outcome in report.survivors:
        mutant = outcome.mutant
        print(f"\nsurvived: {mutant.kernel} [{mutant.operator}]\n  - {mutant.line}\n  + {mutant.becomes}")
        print(f"  {report.explained.get(mutant.key, 'NO REASON')}")
    for key in report.stale:
        print(f"\nstale reason, its mutant is killed or gone: {' | '.join(key)}")
    print(f"\n{len(report.unexplained)} survivors without a reason, {len(report.stale)} stale reasons")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.proof.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=list(suites()), default=[], metavar="NAME")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--limit", type=int, default=SAMPLE, metavar="N", help=f"N of each family (default: {SAMPLE})")
    many.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only of these jit bodies")
    parser.add_argument("--operator", nargs="+", choices=list(OPERATORS), default=list(OPERATORS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    chosen = parser.parse_args(arguments)
    everything = mutants()
    asked = [mutant for mutant in everything if not chosen.kernel or mutant.kernel in chosen.kernel]
    asked = [mutant for mutant in asked if mutant.operator in chosen.operator]
    selected = select(asked, chosen.family, None if chosen.all else chosen.limit)
    if chosen.list:
        for mutant in selected:
            print(" | ".join(mutant.key))
        return 0
    broken = check_unchanged(sorted({family for mutant in selected for family in mutant.families}))
    if broken:
        print(f"the kernels as they are fail {broken}: nothing can be said of mutants")
        return 1
    from rich.console import Console
    from rich.progress import track

    known, console, outcomes = reasons(), Console(stderr=True), []
    for outcome in track(run(selected, chosen.jobs), "mutants", len(selected), console=console, transient=True):
        outcomes.append(outcome)
        if outcome.how == SURVIVED and outcome.mutant.key not in known:
            # at once: a run takes minutes
            print("no reason: " + " | ".join(outcome.mutant.key), file=sys.stderr, flush=True)
    order = {id(mutant): number for number, mutant in enumerate(selected)}
    outcomes.sort(key=lambda outcome: order[id(outcome.mutant)])
    report = Report(outcomes, known, everything)
    show(report)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return 1 if report.unexplained or report.stale else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
