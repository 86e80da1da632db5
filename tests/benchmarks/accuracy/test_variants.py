"""Variants of LoFiT in the report: the table of their differences from LoFiT."""

from dataclasses import replace

import pytest

from benchmarks.accuracy.settings import QUICK
from benchmarks.accuracy.variants import variants_table
from tests.benchmarks.accuracy.stub import session
from tests.benchmarks.accuracy.test_findings import rated

SETTINGS = replace(QUICK, seeds=(("default", 2),))


@pytest.fixture
def table(tmp_path):
    from benchmarks.accuracy.cell_loop import run_cells
    from benchmarks.accuracy.tables import Results

    made = session(tmp_path, replace(SETTINGS, only=("variants",)))
    execute = rated(lambda cell: 0.7 if cell.method == "lofit_both" else 0.5)
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
