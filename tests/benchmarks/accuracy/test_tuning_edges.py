"""Chosen settings at the edge of what tuning tried."""

from dataclasses import replace

import pytest

from benchmarks.accuracy.cell_loop import run_cells
from benchmarks.accuracy.paper_cells import TUNING
from benchmarks.accuracy.session import Session
from benchmarks.accuracy.settings import FULL
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.tuning_edges import choices_made, edges_answer, tuning_table
from tests.benchmarks.accuracy.stub import AVAILABLE, made_up

SETTINGS = replace(FULL, models=("smollm2",), tasks=("mquake",), only=("table3",), n_tuning=10)
GRIDS = {
    # the default of `top` is in the result alone
    "lofit": ({}, {"lr": 0.2}, {"lr": 0.2, "top": 0.4}, {"lr": 0.3}),
    "lora": ({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}, {"lr": 0.4}),
    "red": ({"lr": 0.4}, {"lr": 0.2}, {"lr": 0.1}, {"lr": 0.3}),
    "loreft": ({"span": (0.0, 0.5)}, {"span": (0.5, 1.0)}, {"flag": True}, {"name": "all"}),
    "jola": ({"lr": 0.1}, {"lr": 0.1, "other": 1}, {"lr": 0.1, "other": 2}, {"lr": 0.1, "other": 3}),
}
BEST = {"lofit": 1, "lora": 3, "red": 1, "loreft": 0, "jola": 2}
DEFAULTS = {"lofit": {"lr": 0.1, "top": 0.1}}


def execute(cell):
    number = GRIDS[cell.method].index(dict(cell.options)) if cell.split == TUNING else None
    hits = [float(i < (9 if number == BEST[cell.method] else 5)) for i in range(10)]
    plain = made_up(replace(cell, split="validation"))
    settings = {**DEFAULTS.get(cell.method, {}), **dict(cell.options)}
    return {**plain, "hits": hits, "metrics": {"exact_match": sum(hits) / 10}, "settings": settings}


def choices(output, execute):
    made = Session(output, SETTINGS, AVAILABLE, "make", of=GRIDS.__getitem__)
    # the start grid alone
    tuning = replace(made.tuning, n_runs=4, most=4)
    run_cells(made.slots, made.folder, tuning, execute, summary=output / "summary.json", progress=False)
    results = Results(made.folder, tuning)
    return choices_made(made.slots, results), results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Choices and results with every tuning run."""
    return choices(tmp_path_factory.mktemp("edges"), execute)


def test_edges_are_the_ends_of_the_numbers_tried(whole):
    edges = {choice.runs[0].method: choice.edges for choice in whole[0]}
    assert edges == {
        # 0.2 lies between the default 0.1 and 0.3; 0.1 is the smaller of the two numbers of heads
        "lofit": {"top": "smallest"},
        "lora": {"lr": "largest"},
        # in whatever order they were tried
        "red": {},
        # spans, flags and names have no ends
        "loreft": {},
        # a number tried alone is no end, and 2 lies between 1 and 3
        "jola": {},
    }


def test_the_sentence_counts_methods(whole):
    assert edges_answer(whole[0]) == (
        "2 of 5 choices, of 2 of 5 methods, lie at an edge of what was tried: LoRA in 1 of 1 and LoFiT in 1 of 1."
        " Their best settings may lie outside. Every choice of RED, LoReFT and JoLA lies inside."
    )


def test_the_table_names_the_edge_of_the_chosen_run_alone(whole):
    rows = [line.split(" | ") for line in tuning_table(*whole).splitlines()]
    at_edge = [(row[0].strip("| "), row[2], row[4]) for row in rows[2:] if row[4].strip()]
    assert at_edge == [("LoRA", "**lr 0.4**", "lr largest"), ("LoFiT", "**lr 0.2**", "top smallest")]


def test_missing_runs_choose_nothing(tmp_path):
    def broken(cell):
        if cell.split == TUNING and cell.method == "red" and dict(cell.options)["lr"] == 0.1:
            raise FloatingPointError("stopped")
        return execute(cell)

    found, results = choices(tmp_path, broken)
    text = edges_answer(found)
    assert "2 of 4 choices" in text and "RED" not in text and text.endswith("1 more waits for missing runs.")
    assert "**" not in "".join(line for line in tuning_table(found, results).splitlines() if "| RED" in line)
    assert edges_answer([replace(choice, best=None) for choice in found]) == (
        "Nothing can be said yet: runs of all 5 choices are missing."
    )


def slots_of(results):
    return Session(results.folder.path.parent, SETTINGS, AVAILABLE, "make", of=GRIDS.__getitem__).slots, results


def test_searches_that_go_on_are_counted(whole):
    found, results = whole
    longer = replace(results, tuning=replace(results.tuning, n_runs=5, most=5))
    going_on = [choice for choice in choices_made(*slots_of(longer)) if not choice.over]
    # those of spans, flags and names have nothing more to try
    assert {choice.runs[0].method for choice in going_on} == {"lofit", "lora", "red", "jola"}
    assert edges_answer(found + going_on).endswith(" 4 of these searches are not over.")
