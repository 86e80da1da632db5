"""The loop over cells: each once, resumed, killed in the middle, failing, out of time; and what tuning chooses."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.accuracy.cell_loop import run_cells
from benchmarks.accuracy.estimate import Estimate
from benchmarks.accuracy.paper_cells import TUNING
from benchmarks.accuracy.settings import QUICK
from benchmarks.accuracy.tuning_search import RUNS
from tests.benchmarks.accuracy.stub import BEST_RATE, made_up, session

pytestmark = pytest.mark.usefixtures("unsaved_pictures")

SMALL = replace(QUICK, tasks=("clutrr", "mquake"), only=("table1", "tops"))
TUNED = replace(SMALL, n_tuning=10, only=("table1",), models=("smollm2", "gemma3-270m"))


class Recorder:
    """Counts what is run; fails or is killed at some calls."""

    def __init__(self, fail=(), kill=()):
        self.calls, self.fail, self.kill = [], fail, kill

    def __call__(self, cell):
        self.calls.append(cell)
        if len(self.calls) in self.kill:
            raise KeyboardInterrupt
        if len(self.calls) in self.fail:
            raise FloatingPointError("step 1\ndiverged")
        return made_up(cell)


def run(output, recorder, settings=SMALL, **options):
    return session(output, settings).run(recorder, progress=False, **options)


def test_every_cell_runs_once_and_never_again(tmp_path):
    pytest.importorskip("matplotlib")
    first = Recorder()
    done = run(tmp_path, first)
    assert max(Counter(first.calls).values()) == 1
    assert done["finished"] == done["cells"] == done["run"] == len(first.calls)
    assert len(list((tmp_path / "cells").glob("*.json"))) == len(first.calls)
    again = Recorder()
    assert run(tmp_path, again)["run"] == 0
    assert again.calls == []


def test_tables_share_cells(tmp_path):
    wanted = [
        cell
        for slot in session(tmp_path, replace(QUICK, only=("table1", "table3", "layers"))).slots
        for cell in slot.cells
    ]
    assert len(set(wanted)) < len(wanted)
    tops = [slot for slot in session(tmp_path, SMALL).slots if slot.experiment == "tops"]
    assert [slot.column for slot in tops] == list(QUICK.tops)


def test_a_killed_run_loses_one_cell(tmp_path):
    pytest.importorskip("matplotlib")
    killed = Recorder(kill=(4,))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed)
    assert len(list((tmp_path / "cells").iterdir())) == 3
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] == 3
    resumed = Recorder()
    run(tmp_path, resumed)
    assert resumed.calls[0] == killed.calls[3]
    assert not set(resumed.calls) & set(killed.calls[:3])


def test_a_failed_cell_is_recorded_and_tried_again(tmp_path):
    pytest.importorskip("matplotlib")
    failing = Recorder(fail=(2, 5))
    done = run(tmp_path, failing)
    assert done["failed"] == [
        {"cell": failing.calls[i].name, "error": "FloatingPointError: step 1 diverged"} for i in (1, 4)
    ]
    assert done["finished"] == done["cells"] - 2
    assert failing.calls[1].name in (tmp_path / "report.md").read_text()
    again = Recorder()
    assert run(tmp_path, again)["failed"] == []
    assert again.calls == [failing.calls[1], failing.calls[4]]


def test_nothing_starts_that_may_not_end_in_time(tmp_path):
    made, now, ends = session(tmp_path, SMALL), [0.0], []

    def slow(cell):
        # slower than the table says, as another machine would be
        now[0] += 2.5 * Estimate().seconds(cell)
        ends.append(now[0])
        return made_up(cell)

    def run_within(budget):
        ends.clear()
        options = {"summary": tmp_path / "summary.json", "budget": budget, "progress": False, "clock": lambda: now[0]}
        return run_cells(made.slots, made.folder, made.tuning, slow, **options)

    done = run_within(400.0)
    assert 3 < done["run"] < done["cells"]
    assert done["late"] == done["cells"] - done["run"]
    assert ends[-1] <= 400.0
    assert run_within(None)["late"] == 0


def test_tuning_comes_before_its_cells_and_chooses_the_best(tmp_path):
    recorder = Recorder()
    done = run(tmp_path, recorder, TUNED)
    assert done["finished"] == done["cells"]
    counts = Counter((cell.model, cell.task, cell.method) for cell in recorder.calls if cell.split == TUNING)
    # four to start with, then beyond an edge and between
    assert set(counts.values()) == {RUNS}
    assert {method for _, _, method in counts} == {"iti", "repe", "lofit"}
    for cell in recorder.calls:
        if cell.split == TUNING:
            # what is set aside is no longer trained on
            assert (cell.train_size, cell.n_validation) == ({"clutrr": 54, "mquake": 40}[cell.task], 10)
        elif (cell.model, cell.task, cell.method) in counts:
            assert dict(cell.options) == {"lr": BEST_RATE}
            before = recorder.calls[: recorder.calls.index(cell)]
            assert sum((c.task, c.method, c.split) == (cell.task, cell.method, TUNING) for c in before) >= RUNS
    models = [cell.model for cell in recorder.calls]
    assert models == sorted(models, reverse=True)


def test_cells_wait_for_tuning_that_failed(tmp_path):
    first = Recorder()
    settings = replace(TUNED, tasks=("clutrr",), models=("smollm2",))
    run(tmp_path / "whole", first, settings)
    broken = next(i for i, cell in enumerate(first.calls, 1) if cell.method == "iti" and cell.split == TUNING)
    done = run(tmp_path / "broken", Recorder(fail=(broken,)), settings)
    assert done["waiting"] == 1
    assert done["finished"] == done["cells"] - 1
    assert run(tmp_path / "broken", Recorder(), settings)["waiting"] == 0


def test_what_learns_nothing_has_one_seed(tmp_path):
    settings = replace(SMALL, seeds=(("default", 3),))
    seeds = {slot.row: len(slot.cells) for slot in session(tmp_path, settings).slots if slot.experiment == "table1"}
    assert (seeds["zero_shot"], seeds["constrained"]) == (1, 1)
    assert {seeds[name] for name in ("majority", "iti", "lofit")} == {3}
