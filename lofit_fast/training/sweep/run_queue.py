"""The one queue of a sweep's runs: its folder. Any number of processes, on any hosts, take runs from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from lofit_fast.files import as_json, read_json, write_json
from lofit_fast.locks import alone
from lofit_fast.training.sweep.claims import Claim, claimed
from lofit_fast.training.sweep.grid import Grid, Run
from lofit_fast.training.sweep.membership import CLAIMS, ROWS, Session

Row = dict[str, object]
# processes that may die in one epoch of a run before it is given up: what kills them is the run
MOST_DEATHS = 3
# seconds after which the queue is looked at again where all runs that are left are others'
_LOOK = 0.3


@dataclass(frozen=True)
class Taken:
    """A run of the queue that this process has. resume: whether it goes on with what is there."""

    index: int
    run: Run
    resume: bool


class RunQueue:
    """The runs of a sweep that have no row yet, for one process of it.

    grid, session: of the sweep. runs: the folder of its run folders.
    """

    def __init__(self, grid: Grid, session: Session, runs: Path) -> None:
        self.grid, self.session, self.runs = grid, session, runs
        self._claims, self._rows = session.queue / CLAIMS, session.queue / ROWS
        self._known: dict[str, Row] = {}
        self._groups: dict[object, list[int]] = {}
        for index, run in enumerate(grid.runs):
            self._groups.setdefault(step1_of(index, run), []).append(index)

    def rows(self) -> dict[int, Row]:
        """index -> row of every run that has ended so far, whoever ran it."""
        names = {path.stem for path in self._rows.glob("*.json")} - self._known.keys()
        for run in self.grid.runs:
            if run.name in names and (row := _read_row(self._rows / f"{run.name}.json")) is not None:
                self._known[run.name] = row
        return {i: self._known[run.name] for i, run in enumerate(self.grid.runs) if run.name in self._known}

    def end(self, index: int, row: Row) -> None:
        """Keep a run's row: it has ended."""
        write_json(self._rows / f"{self.grid.runs[index].name}.json", as_json(row))

    def taken(self) -> Iterator[Taken]:
        """Every run that this process is to train, one after the other: `bundles` of one."""
        with closing(self.bundles(1)) as bundles:
            for (taken,) in bundles:
                yield taken

    def bundles(self, most: int, alike: Callable[[Run], object] = lambda run: None) -> Iterator[list[Taken]]:
        """The runs that this process is to train, up to `most` at a time, until all runs of the sweep have a row.

        alike: equal for runs that may be in one bundle. Runs are this process's until the next are asked for, or the
        iterator is closed. Where all that are left are others', it waits: theirs come back if they die.
        """
        while len(ended := self.rows()) < len(self.grid.runs):
            with ExitStack() as held:
                bundle: list[Taken] = []
                led: set[object] = set()
                for index, run in enumerate(self.grid.runs):
                    if index in ended or (bundle and alike(run) != alike(bundle[0].run)):
                        continue
                    if (taken := self._take(index, ended, led, held)) is not None:
                        bundle.append(taken)
                    if len(bundle) == most:
                        break
                if bundle:
                    yield bundle
            if not bundle:
                time.sleep(_LOOK)

    def _take(self, index: int, ended: dict[int, Row], led: set[object], held: ExitStack) -> Taken | None:
        """Make a run this process's while `held` is open; None where it is not to be had now.

        led: the step 1s that this process trains for others already, to which one may be added.
        """
        run = self.grid.runs[index]
        with ExitStack() as stack:
            try:
                group = self._lead(index, ended, led, stack)
                claim = stack.enter_context(claimed(self._claims, run.name, self._progress(run)))
            except BlockingIOError:
                return None
            # it may have ended since
            if index in self.rows():
                return None
            if claim.deaths >= MOST_DEATHS:
                self.end(index, _given_up(run, claim))
                return None
            led.add(group)
            held.enter_context(stack.pop_all())
            return Taken(index, run, self.session.resume or claim.begun)

    def _progress(self, run: Run) -> int:
        """How far a run is: it has a line of history per epoch."""
        path = self.runs / run.name / "history.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def _lead(self, index: int, ended: dict[int, Row], led: set[object], stack: ExitStack) -> object:
        """Be the one that trains the step 1 of several runs, where none has; BlockingIOError where another does."""
        group = step1_of(index, self.grid.runs[index])
        members = self._groups[group]
        if len(members) > 1 and group not in led and not any(self._has_heads(other, ended) for other in members):
            # no run has a name with a space
            stack.enter_context(alone(self._claims / f"step1 of {members[0]}.lock", "train a step 1 that runs share"))
        return group

    def _has_heads(self, index: int, ended: dict[int, Row]) -> bool:
        """Whether a run has its heads: then the step 1 that it shares is there."""
        if index in ended:
            return ended[index]["status"] == "done"
        name = self.grid.runs[index].name
        # one that starts over has not taken away yet what an earlier sweep has left
        is_ours = self.session.resume or (self._claims / f"{name}.json").is_file()
        return is_ours and (self.runs / name / "heads.json").is_file()


def step1_of(index: int, run: Run) -> object:
    """Equal for runs that share a step 1."""
    return index if run.heads is not None else (run.train_size, json.dumps(run.recipe.of_step1(), sort_keys=True))


def _given_up(run: Run, claim: Claim) -> Row:
    error = (
        f"ChildProcessError: {claim.deaths} processes have died in this run, one after the other, in the same epoch; "
        f"the last was {claim.by}: out of memory perhaps, or killed"
    )
    return {"name": run.name, **run.varied, "status": "failed", "error": error}


def _read_row(path: Path) -> Row | None:
    """A row; None where it is not whole, as if the run had not ended."""
    try:
        row = read_json(path)
        return row if isinstance(row, dict) and {"name", "status"} <= row.keys() else None
    except (OSError, ValueError):
        return None
