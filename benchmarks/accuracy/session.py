"""One run of `make paper`: settings and data into a plan, the plan into cells, the cells into a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.accuracy.cell_loop import Execute, all_cells, run_cells, seconds_left
from benchmarks.accuracy.cell_settings import agree, settings_today
from benchmarks.accuracy.estimate import Estimate
from benchmarks.accuracy.experiments import Available, Plan
from benchmarks.accuracy.method_table import grid
from benchmarks.accuracy.paper_cells import Cell, CellFolder
from benchmarks.accuracy.paper_report import write_report
from benchmarks.accuracy.settings import EXPERIMENTS, FULL, QUICK, Settings, from_json
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.tuning import Grid, Tuning
from lofit_fast.files import writable_folder, write_json

PLAN, SUMMARY = "plan.json", "summary.json"


def settings_of(
    quick: bool,
    *,
    models: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    seeds: int | None = None,
) -> Settings:
    """The quick or full settings with what was asked for instead. Raises ValueError for experiments that are none."""
    if unknown := sorted(set(only) - set(EXPERIMENTS)):
        raise ValueError(f"got the experiments {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    base = QUICK if quick else FULL
    asked = {"models": models, "tasks": tasks, "only": only}
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"expected at least one seed, got {seeds}")
        asked |= {"seeds": (("default", seeds),), "candidate_seeds": seeds}
    return replace(base, **{key: value for key, value in asked.items() if value})


class Session:
    """An output folder with the plan of its cells. of: a method's settings to try, see `method_table.grid`.

    dtype: of `load_model`; with another than "auto", cells that were made in another are made anew.
    """

    def __init__(
        self,
        output: Path | str,
        settings: Settings,
        available: Available,
        command: str,
        of: Grid = grid,
        dtype: str = "auto",
    ) -> None:
        self.output, self.settings, self.available, self.command = Path(output), settings, available, command
        self.dtype, self.slots = dtype, Plan(settings, available).slots()
        self.folder = CellFolder(self.output / "cells", self._current)
        sizes = {name: min(count, settings.train_size or count) for name, count in available.train.items()}
        self.tuning = Tuning(self.folder, settings.n_tuning, sizes, settings.epochs, of)

    @classmethod
    def read(cls, output: Path | str, of: Grid = grid) -> Session:
        """The session that left a plan in the folder. Raises FileNotFoundError when none did."""
        path = Path(output) / PLAN
        if not path.is_file():
            raise FileNotFoundError(f"no {PLAN} in {output}: nothing was run there")
        content = json.loads(path.read_text())
        available = {key: tuple(value) if isinstance(value, list) else value for key, value in content["data"].items()}
        return cls(output, from_json(content["settings"]), Available(**available), content["command"], of)

    def _current(self, cell: Cell, content: Mapping) -> bool:
        """Whether a finished cell has the settings, and the dtype, that it would be run with today."""
        same = self.dtype in ("auto", content["environment"].get("dtype"))
        return same and agree(settings_today(cell), content["settings"])

    def outlook(self) -> dict[str, object]:
        """How many cells there are, how many of them are to be run, and how many minutes that is estimated to take."""
        cells = all_cells(self.slots, self.folder, self.tuning)
        missing = [cell for cell in cells if self.folder.result(cell) is None]
        seconds = seconds_left(self.slots, self.folder, self.tuning, Estimate())
        return {"cells": len(cells), "to_run": len(missing), "minutes": seconds / 60}

    def names(self) -> list[str]:
        """The cells that are to be run, tuning runs included, as far as they are settled."""
        cells = all_cells(self.slots, self.folder, self.tuning)
        return sorted(cell.name for cell in cells if self.folder.result(cell) is None)

    def run(self, execute: Execute, *, budget: float | None = None, progress: bool = True) -> dict[str, object]:
        """Run what is missing and write the report; returns the summary. budget: seconds.

        A plan in the folder that has all of these cells and more stays, and the report is of all of it.
        """
        writable_folder(self.output)
        whole = self._covered_by() or self
        content = {"command": whole.command, "settings": asdict(whole.settings), "data": asdict(whole.available)}
        write_json(self.output / PLAN, content)
        summary = self.output / SUMMARY
        done = run_cells(
            self.slots, self.folder, self.tuning, execute, summary=summary, budget=budget, progress=progress
        )
        return {**done, "report": str(whole.report())}

    def _covered_by(self) -> Session | None:
        """The session whose plan is in the folder, where it has every slot of this one."""
        if not (self.output / PLAN).is_file():
            return None
        there = Session.read(self.output, self.tuning.of)
        return there if set(self.slots) <= set(there.slots) and there.available == self.available else None

    def report(self) -> Path:
        """Write the report from the cells that are there."""
        path = self.output / SUMMARY
        summary = json.loads(path.read_text()) if path.is_file() else None
        results = Results(self.folder, self.tuning)
        return write_report(self.output, self.settings, self.available, results, self.command, summary)
