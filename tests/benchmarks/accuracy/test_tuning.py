"""Which settings a cell is given: the best of all, or of those with some of the heads where it asks which they are."""

import json
from dataclasses import replace

from benchmarks.accuracy.session import Session
from benchmarks.accuracy.settings import FULL
from benchmarks.accuracy.tuning import settled_so_far
from tests.benchmarks.accuracy.stub import AVAILABLE, grid, made_up

ONE = replace(FULL, models=("smollm2",), tasks=("clutrr",))
# accuracy by share of the heads: the more the better
START = tuple({"top": top} for top in (0.1, 0.2, 0.5, 1.0))


def searched(tmp_path, only):
    """A session whose searches are over, and all heads the best of LoFiT's."""
    start = {"lofit": START}
    made = Session(tmp_path, replace(ONE, only=only), AVAILABLE, "", of=lambda method: start.get(method, grid(method)))
    cells = [cell for slot in made.slots for cell in slot.cells]
    while missing := [run for cell in cells for run in made.tuning.runs(cell) if made.folder.result(run) is None]:
        for run in dict.fromkeys(missing):
            rate = min(dict(run.options).values())
            made.folder.write(run, {**made_up(replace(run, options=(("lr", rate),))), "settings": dict(run.options)})
    return made


def test_sections_of_which_heads_leave_some_out(tmp_path):
    made = searched(tmp_path, ("table1", "table2", "layers", "tops", "variants", "combining", "sizes", "preset"))
    tops = {}
    for slot in made.slots:
        for cell in slot.cells:
            if cell.selector:
                tops.setdefault(slot.experiment, set()).add(dict(made.tuning.settled(cell).options).get("top", 0.1))
    some = max(top for found in tops.values() for top in found if top < 1.0)
    assert tops.pop("tops") == set(ONE.tops)
    assert tops == {
        **dict.fromkeys(("table1", "sizes", "preset"), {1.0}),
        **dict.fromkeys(("table2", "layers", "variants", "combining"), {some}),
    }


def test_the_number_of_heads_that_lofit_has_anyway_is_no_option(tmp_path):
    made = searched(tmp_path, ("tops",))
    tops = {slot.column: made.tuning.settled(slot.cells[0]) for slot in made.slots}
    assert dict(tops[0.2].options) == {"top": 0.2}
    assert tops[0.1].options == ()


def test_a_cell_with_its_settings_does_not_say_who_asked(tmp_path):
    made = searched(tmp_path, ("layers",))
    (asked,) = {slot.cells[0] for slot in made.slots}
    settled = made.tuning.settled(asked)
    assert asked.some_heads and not settled.some_heads
    assert "some_heads" not in json.dumps(settled.spec())
    # one that may have all, and had chosen the same
    assert settled == made.tuning.settled(replace(asked, some_heads=False, options=settled.options))
    assert settled_so_far([asked, replace(settled, options=())], made.tuning) == [
        settled,
        made.tuning.settled(replace(asked, some_heads=False)),
    ]
