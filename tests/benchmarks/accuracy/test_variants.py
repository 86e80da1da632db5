"""Variants of LoFiT in the report: what is said of gains, of losses and of missing cells."""

from dataclasses import replace

import pytest

from benchmarks.accuracy.settings import QUICK
from benchmarks.accuracy.variants import variants_table
from tests.benchmarks.accuracy.stub import session
from tests.benchmarks.accuracy.test_findings import answer, rated

SETTINGS = replace(QUICK, seeds=(("default", 2),))


def rates(**others):
    """LoFiT answers half of the questions."""
    return rated(lambda cell: others.get(f"{cell.method}_{cell.task}", others.get(cell.method, 0.5)))


def test_one_that_gains_on_two_tasks_is_named(tmp_path):
    text = answer(tmp_path, "variants", rates(lofit_both=0.7, lofit_all=0.3), SETTINGS)
    assert text.startswith("LoFiT, all heads, scales kept gains 3 points or more on 2 tasks of smollm2. 6 comparisons:")
    assert "missing" not in text and "below LoFiT, all heads, scales kept" in text


def test_a_gain_on_one_task_is_none(tmp_path):
    text = answer(tmp_path, "variants", rates(lofit_both_mquake=0.9), SETTINGS)
    assert text.startswith("None of the finished variants gains 3 points or more on 2 tasks of smollm2. 6 comparisons:")


def test_missing_cells_are_told_where_they_may_change_the_answer(tmp_path):
    def failing(cell):
        # of two tasks both are needed: one that gains nothing on the first has lost already
        if cell.method == "lofit_units" or (cell.method == "lofit_all" and cell.task == "clutrr"):
            raise RuntimeError("no")
        return rates()(cell)

    text = answer(tmp_path, "variants", failing, SETTINGS)
    assert "Missing cells may still change that for LoFiT, all heads, in units of their spread. " in text


@pytest.fixture
def table(tmp_path):
    from benchmarks.accuracy.cell_loop import run_cells
    from benchmarks.accuracy.tables import Results

    made = session(tmp_path, replace(SETTINGS, only=("variants",)))
    execute = rates(lofit_both=0.7)
    run_cells(made.slots, made.folder, made.tuning, execute, summary=tmp_path / "summary.json", progress=False)
    return variants_table(made.slots, Results(made.folder, made.tuning))


def test_the_table_has_differences_intervals_and_p(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 4 * 2
    both = next(row for row in rows if row[:2] == ["LoFiT, all heads, scales kept", "MQuAKE"])
    assert both[2].startswith("70.0") and both[3] == "+20.0" and float(both[5]) < 0.05
    low, high = map(float, both[4].split(" to "))
    assert 0 < low < 20 < high
    lofit = next(row for row in rows if row[:2] == ["LoFiT", "MQuAKE"])
    assert lofit[3:6] == ["", "", ""]
