"""LoFiT and LoRA together: whose settings they have, and what the report says of gains, losses and missing cells."""

from dataclasses import replace

import pytest

from benchmarks.accuracy.cell_loop import run_cells
from benchmarks.accuracy.combining import combining_table
from benchmarks.accuracy.method_table import COMBINED
from benchmarks.accuracy.paper_cells import TUNING
from benchmarks.accuracy.session import Session
from benchmarks.accuracy.settings import FULL, QUICK
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.tuning_search import RUNS
from tests.benchmarks.accuracy.stub import AVAILABLE, made_up, session
from tests.benchmarks.accuracy.test_findings import answer, rated

SETTINGS = replace(QUICK, seeds=(("default", 2),), sweep_tasks=("clutrr", "mquake"))
TUNED = replace(FULL, models=("smollm2",), tasks=("mquake",), only=("combining",), n_tuning=10)
GRIDS = {
    "lofit": ({}, {"tune_lr": 0.2}, {"tune_lr": 0.2, "top": 0.4}, {"top": 0.2}),
    "lora": ({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}, {"lr": 0.4}),
}
BEST = {"lofit": {"tune_lr": 0.2, "top": 0.4}, "lora": {"lr": 0.2}}


def rates(**others):
    """LoFiT and LoRA answer half of the questions."""
    return rated(lambda cell: others.get(f"{cell.method}_{cell.task}", others.get(cell.method, 0.5)))


def tuned(cell):
    """The best of all settings are those of `BEST`."""
    if cell.split != TUNING:
        return made_up(cell)
    rate = 1.0 if dict(cell.options) == BEST[cell.method] else 0.5
    return {**made_up(replace(cell, split="validation")), "metrics": {"exact_match": rate}}


def run(output, execute, settings=TUNED):
    made = Session(output, settings, AVAILABLE, "make", of=GRIDS.__getitem__)
    run_cells(made.slots, made.folder, made.tuning, execute, summary=output / "summary.json", progress=False)
    return made


def test_their_settings_are_those_tuned_for_each_alone(tmp_path):
    made = run(tmp_path, tuned)
    settled = {cell.method: made.tuning.settled(cell) for slot in made.slots for cell in slot.cells if cell.seed == 43}
    assert {name: dict(settled[name].options) for name in BEST} == BEST
    assert all(dict(settled[name].options) == {**BEST["lofit"], **BEST["lora"]} for name in COMBINED)
    # none of their own
    written = [path.name for path in (tmp_path / "cells").iterdir() if TUNING in path.name]
    assert len(written) == 2 * RUNS and not any(name in path for name in COMBINED for path in written)
    assert Results(made.folder, made.tuning).counts(made.slots).missing == 0


def test_they_wait_while_a_run_of_either_is_missing(tmp_path):
    def broken(cell):
        if cell.split == TUNING and dict(cell.options) == {"lr": 0.4}:
            raise FloatingPointError("stopped")
        return tuned(cell)

    made = run(tmp_path, broken)
    waiting = {cell.method for slot in made.slots for cell in slot.cells if made.tuning.settled(cell) is None}
    assert waiting == {"lora", *COMBINED}


def test_one_that_is_above_both_is_named(tmp_path):
    text = answer(tmp_path, "combining", rates(lofit_on_lora=0.9, lora_on_heads_mquake=0.1), SETTINGS)
    first, *lines = text.split("\n")
    assert first.startswith(
        "* **LoFiT on LoRA** is above both of them on CLUTRR and MQuAKE, with 2 of 2 tasks finished. 4 comparisons: "
    )
    assert lines[0].startswith("  * **CLUTRR**: LoFiT on LoRA has 89.6 % (") and "above LoFiT and LoRA (" in lines[0]
    assert lines[2].startswith(
        "* **LoRA in the layers of LoFiT's heads** is above both of them on no task, with 2 of 2"
    )
    assert "below LoFiT (-40.0, " in lines[4]


def test_above_one_of_them_is_not_above_both(tmp_path):
    text = answer(tmp_path, "combining", rates(lofit=0.1, lora=0.6, lofit_on_lora=0.6), SETTINGS)
    assert text.startswith(
        "* **LoFiT on LoRA** is above both of them on no task, with 2 of 2 tasks finished. 4 comparisons: "
    )


def test_missing_cells_are_told(tmp_path):
    def failing(cell):
        return 1 / 0 if cell.method == "lora" and cell.task == "mquake" else rates()(cell)

    text = answer(tmp_path, "combining", failing, SETTINGS)
    assert text.startswith("* **LoFiT on LoRA** is above both of them on no task, with 1 of 2 tasks finished. 3 compa")
    assert "not finished: LoRA." in text


@pytest.fixture
def table(tmp_path):
    made = session(tmp_path, replace(SETTINGS, only=("combining",)))
    execute = rates(lofit_on_lora=0.7, lora=0.6)
    run_cells(made.slots, made.folder, made.tuning, execute, summary=tmp_path / "summary.json", progress=False)
    return combining_table(made.slots, Results(made.folder, made.tuning))


def test_the_table_has_both_differences_parameters_and_seconds(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 4 * 2
    both = next(row for row in rows if row[:2] == ["LoFiT on LoRA", "MQuAKE"])
    assert both[2].startswith("70.0") and both[3].startswith("+20.0, +") and both[4].startswith("+10.0, +")
    assert both[5:] == ["1,728", "7", "CPU, 2 threads, engine compiled"]
    lora = next(row for row in rows if row[:2] == ["LoRA", "MQuAKE"])
    assert lora[3].startswith("+10.0, ") and lora[4] == ""
