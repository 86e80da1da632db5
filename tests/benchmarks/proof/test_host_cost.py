"""The host's share of a projection, as a count of Python calls: exact where a clock is not."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks.proof.host_cost import LABEL, LAYERS, calls, main

# Python calls of ours per projection, forward and backward, less those of the frozen projection. A higher count than
# this is a step that launches more slowly; a lower one should be written down here
# eight of step 2's see to it that an early W v is still of the weight and the offset that it was made of
BUDGET = {"step 1": 43, "step 2": 41}


@pytest.fixture(scope="module")
def counted():
    return calls()


@pytest.mark.parametrize("step", BUDGET)
def test_a_projection_makes_no_more_calls_than_its_budget(counted, step):
    extra = (counted["ours", step] - counted["floor", step]) / LAYERS
    assert extra <= BUDGET[step]
    # a budget that has grown stale holds nothing
    assert extra > BUDGET[step] - 5


def test_counts_are_exact(counted):
    again = calls()
    assert again == counted


def test_the_command_prints_its_table(capsys, tmp_path):
    assert main(["--rounds", "2", "--json", str(tmp_path / "host.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(LABEL) and "step 2  ours" in printed
    found = json.loads((tmp_path / "host.json").read_text())
    assert found["label"] == LABEL
    assert {(row["step"], row["row"]) for row in found["rows"]} == {
        (step, row) for step in BUDGET for row in ("floor", "hook", "ours")
    }
    assert all(row["microseconds"] > 0 and row["calls"] > 0 for row in found["rows"])
