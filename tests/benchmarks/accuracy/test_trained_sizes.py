"""Accuracy per trained number: which cells are points, what is best at a power of ten, and one device's seconds."""

from dataclasses import replace

import pytest

from benchmarks.accuracy import method_table
from benchmarks.accuracy.cell_loop import run_cells
from benchmarks.accuracy.experiments import TABLE3
from benchmarks.accuracy.settings import QUICK
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.trained_sizes import (
    SizePoint,
    best_of,
    of_one_device,
    quickest,
    size_answer,
    size_points,
    size_table,
)
from tests.benchmarks.accuracy.stub import made_up, session

SETTINGS = replace(QUICK, tasks=("mquake",), only=("table1", "table3", "sizes", "tops"), seeds=(("default", 2),))
# trained numbers and share of right answers
SIZES = {"lora": (460_800, 0.8), "red": (34_560, 0.8), "loreft": (138_360, 0.8), "jola": (35_100, 0.3)}


def execute(cell):
    numbers, rate = SIZES.get(cell.method, (0, 0.1))
    if cell.method == "lofit":
        share = dict(cell.options).get("top", 0.1)
        numbers, rate = round(17_280 * share), 0.2 if share < 0.05 else 0.7
    hits = [float(i < round(rate * cell.n_validation)) for i in range(cell.n_validation)]
    made = {**made_up(cell), "n_parameters": numbers, "hits": hits, "metrics": {"exact_match": rate}}
    return {**made, "seconds": {**made["seconds"], "training": numbers / 1000}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Slots and results with every cell."""
    made = session(tmp_path_factory.mktemp("sizes"), SETTINGS)
    run_cells(made.slots, made.folder, made.tuning, execute, summary=made.output / "summary.json", progress=False)
    return made.slots, Results(made.folder, made.tuning)


def point(numbers, rate, seed=42, device="CPU", seconds=1.0, method="lora", n=40):
    result = {
        "cell": {"seed": seed, "method": method},
        "hits": [float(i < round(rate * n)) for i in range(n)],
        "seconds": {"selection": 0.0, "training": seconds},
        "environment": {"device": device, "engine": "compiled"},
    }
    return SizePoint("smollm2", "mquake", method, numbers, (result,))


def test_every_size_is_a_point_and_smaller_training_is_none(whole):
    points = size_points(*whole)
    assert [(one.method, one.numbers) for one in points] == [
        ("lofit", 173),
        ("lofit", 518),
        ("lofit", 1728),
        ("lofit", 5184),
        ("red", 34_560),
        ("jola", 35_100),
        ("loreft", 138_360),
        ("lora", 460_800),
    ]
    # two seeds each, and those of 10 % of the heads once though two tables have them
    assert all(len(one.results) == 2 for one in points)
    assert {one["cell"]["train_size"] for size in points for one in size.results} == {50}


def test_the_answer_by_powers_of_ten(whole):
    lines = size_answer(*whole).split("\n")
    assert "10^2 trained numbers** (32 to 316). MQuAKE: only LoFiT with 173 is finished, 20.0 %" in lines[0]
    assert "MQuAKE: LoFiT with 1,728 is best, 70.0 % (" in lines[1] and "above LoFiT with 518." in lines[1]
    assert "MQuAKE: only LoFiT with 5,184 is finished" in lines[2]
    assert "RED with 34,560 is best" in lines[3]
    assert "not told apart from LoReFT with 138,360, above JoLA with 35,100." in lines[3]
    assert "only LoRA with 460,800" in lines[4]
    # 21 of 30 beside 24 of 30: three questions cannot be told from none
    assert lines[5].startswith("* **The fewest that keep up**") and "LoFiT with 1,728 (-10.0, " in lines[5]
    # two seconds of choosing heads, and a thousandth of one per number
    assert (
        "LoFiT with 1,728 in 4 s, RED with 34,560, the most accurate, in 37 s (CPU, 2 threads, engine compiled)."
        in lines[6]
    )
    assert len(lines) == 7


def test_the_table_has_every_point(whole):
    rows = [line for line in size_table(*whole).splitlines() if line.startswith(("| L", "| R", "| J"))]
    assert len(rows) == 8
    assert rows[2] == "| LoFiT | MQuAKE, smollm2 | 4 heads | 1,728 | 70.0 ± 0.0 | 4 | CPU, 2 threads, engine compiled |"


def test_where_nothing_is_the_answer_says_so(tmp_path):
    tasks = {"tasks": ("clutrr", "mquake"), "sweep_tasks": ("clutrr",)}
    made = session(tmp_path, replace(SETTINGS, **tasks, only=("table3", "tops"), seeds=(("default", 1),)))

    def some(cell):
        if cell.task == "clutrr" and cell.method != "lora":
            raise FloatingPointError("stopped")
        return execute(cell)

    run_cells(made.slots, made.folder, made.tuning, some, summary=tmp_path / "summary.json", progress=False)
    text = size_answer(made.slots, Results(made.folder, made.tuning))
    assert "About 10^3 trained numbers** (317 to 3,162). MQuAKE: only LoFiT with 1,728 is finished" in text
    assert "About 10^4 trained numbers** (3,163 to 31,622). Nothing was tried, or it is not finished, on CLUTRR" in text
    assert "LoFiT on CLUTRR, smollm2, 1 %, 3 % and 30 % of the heads" in text
    assert "RED on CLUTRR, smollm2;" in text
    # one point is no comparison
    assert "CLUTRR: LoRA" not in text


def test_the_best_of_equals_is_the_smallest_and_other_seeds_stay_open():
    small, large, low, other = point(10, 0.8), point(100, 0.8), point(20, 0.2), point(30, 0.5, seed=50)
    best = best_of([large, low, small, other])
    assert (best.point, best.level, best.lower, best.open) == (small, [large], [low], [other])


def test_nothing_is_quickest_where_the_most_accurate_was_timed_elsewhere():
    points = [point(10, 0.9, device="A"), point(20, 0.5, device="B"), point(30, 0.5, device="B")]
    assert quickest(points) == f"{points[0].label}, the most accurate, was timed on another device than most."
    assert quickest(points[1:]).startswith(points[1].label)


def test_seconds_compare_on_the_commonest_device():
    points = [point(10, 0.5, device="A"), point(20, 0.5, device="B"), point(30, 0.5, device="B")]
    assert of_one_device(points) == ("B, engine compiled", points[1:])
    assert of_one_device([]) == (None, [])
    mixed = replace(points[0], results=(*points[0].results, *points[1].results))
    assert of_one_device([mixed]) == (None, [])


def test_the_picture_has_both_rows(whole):
    pytest.importorskip("matplotlib")
    from benchmarks.accuracy.size_figure import parameters

    upper, lower = parameters(*whole, "title").axes
    assert (upper.get_xscale(), lower.get_xscale()) == ("log", "linear")
    assert [len(panel.containers) for panel in (upper, lower)] == [5, 5]


def test_every_method_in_the_picture_has_a_colour_of_its_own():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex

    from benchmarks.accuracy.size_figure import _COLOURS

    drawn = {*method_table.SIZES, *TABLE3, *method_table.VARIANTS}
    assert len({to_hex(colour) for colour in _COLOURS}) == len(_COLOURS) >= len(drawn)
