"""Which settings a cell is given: the best of all, or of those with some of the heads where it asks which they are."""

import json
from dataclasses import replace

from benchmarks.accuracy.cell_settings import recipe_of
from benchmarks.accuracy.session import Session
from benchmarks.accuracy.settings import FULL
from benchmarks.accuracy.tuning import settled_so_far
from lofit_fast.config import RECIPES
from tests.benchmarks.accuracy.stub import AVAILABLE, grid, made_up

# LoFiT's settings to try, of both steps
STARTS = {"lofit": ({"select_lr": 3e-3}, {"select_lr": 1e-3, "tune_lr": 2e-2}, {"top": 0.2}, {"tune_lr": 3e-2})}.get
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


def test_heads_of_another_task_are_chosen_with_that_tasks_settings(tmp_path):
    made = Session(tmp_path, replace(FULL, models=("smollm2",), only=("transfer",)), AVAILABLE, "", of=STARTS)
    slots = {(slot.row, slot.column): slot for slot in made.slots}
    borrowed = slots["clutrr", "mquake"].cells[0]
    for task, best in {"mquake": 1, "clutrr": 0}.items():
        assert made.tuning.settled(borrowed) is None
        own = slots[task, task].cells[0]
        while missing := [run for run in made.tuning.runs(own) if made.folder.result(run) is None]:
            run = missing[0]
            is_best = dict(run.options) == STARTS("lofit")[best]
            made.folder.write(
                run, {**made_up(replace(run, options=(("lr", 1.0 if is_best else 0.1),))), "settings": {}}
            )
    assert dict(made.tuning.settled(borrowed).options) == {"select_lr": 3e-3, "tune_lr": 2e-2}
    recipe = recipe_of(made.tuning.settled(borrowed))
    # what nobody has tuned is published, by task: step 1's of the one, step 2's of the other
    assert (recipe.l1, recipe.select_lr, recipe.tune_lr) == (RECIPES["clutrr"]["l1"], 3e-3, 2e-2)
    plain = recipe_of(replace(borrowed, options=()))
    assert (plain.select_lr, plain.tune_lr) == (RECIPES["clutrr"]["select_lr"], RECIPES["mquake"]["tune_lr"])
