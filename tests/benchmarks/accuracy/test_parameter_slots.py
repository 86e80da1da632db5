"""The plan's sizes of every method: which cells they are, which of them are other tables', and what they are set to."""

import inspect
from dataclasses import asdict, replace

import pytest

from benchmarks.accuracy.cell_loop import all_cells, run_cells
from benchmarks.accuracy.method_table import SIZES
from benchmarks.accuracy.paper_cells import TUNING
from benchmarks.accuracy.settings import FULL, QUICK, from_json
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.trained_sizes import size_answer, size_points, size_table
from benchmarks.accuracy.tuning_search import RUNS
from tests.benchmarks.accuracy.stub import BEST_RATE, made_up, session

TUNED = replace(FULL, n_tuning=10, tasks=("mquake",))


def sized(cells):
    """(method, its size) of every cell, each once."""
    return list(dict.fromkeys((cell.method, *(value for _, value in cell.options)) for cell in cells))


def cells_of(made, experiment, model="smollm2"):
    return [cell for slot in made.slots if (slot.experiment, slot.model) == (experiment, model) for cell in slot.cells]


def test_every_size_is_a_cell_and_its_own_size_is_the_main_one(tmp_path):
    cells = cells_of(session(tmp_path, replace(QUICK, only=("parameters",))), "parameters")
    assert sized(cells) == [
        *(("lofit", 0.01), ("lofit", 0.03), ("lofit",), ("lofit", 0.3), ("lofit_scaled", 0.1)),
        *(("lora", 1), ("lora", 2), ("lora", 4), ("lora",)),
        *(("lora_all", 1), ("lora_all", 2), ("lora_all", 4), ("lora_all",)),
        *(("loreft", 1), ("loreft",), ("loreft", 8), ("red",), ("jola",), ("ia3",), ("beft",)),
    ]


def test_tables_and_the_figure_of_heads_share_their_cells(tmp_path):
    made = session(tmp_path, replace(TUNED, models=("smollm2",)))
    own, tops = cells_of(made, "parameters"), cells_of(made, "tops")
    # tuning may choose another number of heads than the default: it is an option of its own
    assert ("lofit", 0.1) in sized(own) and ("lofit",) not in sized(own)
    assert {cell for cell in tops if dict(cell.options)["top"] != 0.2} < set(own)
    main = {cell for cell in cells_of(made, "table3") if cell.method != "lofit"}
    assert main < set(own)


def test_other_models_have_some_sizes_of_two_methods(tmp_path):
    made = session(tmp_path, replace(TUNED, only=("parameters",)))
    others = cells_of(made, "parameters", "gemma3-270m")
    assert sized(others) == [("lofit", 0.03), ("lofit", 0.1), ("lofit", 0.3), ("lora",)]
    assert {cell.seed for cell in others} == {42, 43}


def test_sizes_are_judged_on_their_own_task_alone(tmp_path):
    made = session(tmp_path, replace(TUNED, tasks=("truthfulqa", "mquake"), models=("smollm2",), only=("parameters",)))
    lofit = [cell for cell in cells_of(made, "parameters") if (cell.method, cell.task) == ("lofit", "truthfulqa")]
    # a tenth of the heads may be what tuning chooses: then it is the main cell
    outside = {dict(cell.options)["top"]: cell.outside for cell in lofit}
    assert outside == {0.01: (), 0.03: (), 0.1: ("mquake",), 0.3: ()}


@pytest.mark.parametrize("method", [name for name, sizes in SIZES.items() if sizes.option == "rank"])
def test_the_default_size_is_the_peers(method):
    from benchmarks.peers.table import COMPARED

    assert inspect.signature(COMPARED[method].make).parameters["rank"].default == SIZES[method].default


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tuned session with every cell, each size with a number of its own."""
    settings = replace(TUNED, only=("parameters",), seeds=(("default", 1),))
    made = session(tmp_path_factory.mktemp("parameters"), settings)

    def written(cell):
        if made.folder.result(cell) is None:
            sizes = SIZES[cell.method]
            size = dict(cell.options).get(sizes.option, sizes.default) or 1
            made.folder.write(cell, {**made_up(cell), "n_parameters": round(1000 * size)})

    # without the summary after every cell
    for cell in (cell for slot in made.slots for cell in slot.cells):
        while made.tuning.settled(cell) is None:
            for run in made.tuning.runs(cell):
                written(run)
        written(made.tuning.settled(cell))
    return made


def test_all_sizes_share_the_tuning_runs_of_their_method(whole):
    runs = [cell for cell in all_cells(whole.slots, whole.folder, whole.tuning) if cell.split == TUNING]
    tuned = {(cell.model, cell.method) for cell in runs}
    assert tuned == {
        *(("smollm2", name) for name in SIZES if name != "lofit_scaled"),
        *(("gemma3-270m", "lofit"), ("gemma3-270m", "lora")),
    }
    assert len(runs) == RUNS * len(tuned)
    ranks = {dict(cell.options).get("rank") for cell in runs}
    assert ranks == {None}
    main = [cell for cell in all_cells(whole.slots, whole.folder, whole.tuning) if cell.split != TUNING]
    assert {dict(cell.options)["lr"] for cell in main} == {BEST_RATE}


def test_every_size_is_a_point_and_a_row_of_the_table(whole):
    results = Results(whole.folder, whole.tuning)
    points = [point for point in size_points(whole.slots, results) if point.model == "smollm2"]
    sizes = {(point.method, point.size) for point in points}
    assert {("lora", f"rank {rank}") for rank in (1, 2, 4, 8)} | {("loreft", "rank 4"), ("red", "")} < sizes
    assert sum(point.method == "lofit" for point in points) == 4
    rows = size_table(whole.slots, results).splitlines()
    assert sum(row.startswith("| LoRA on all linears | MQuAKE, smollm2 | rank ") for row in rows) == 4


def test_sizes_that_are_missing_are_named(tmp_path):
    made = session(tmp_path, replace(QUICK, only=("parameters",)))

    def some(cell):
        if dict(cell.options).get("rank") in (1, 2):
            raise FloatingPointError("stopped")
        return made_up(cell)

    run_cells(made.slots, made.folder, made.tuning, some, summary=tmp_path / "summary.json", progress=False)
    text = size_answer(made.slots, Results(made.folder, made.tuning))
    assert "LoRA on MQuAKE, smollm2, rank 1 and 2;" in text and "LoReFT on MQuAKE, smollm2, rank 1." in text


def test_a_plan_of_other_fields_is_none():
    content = asdict(FULL)
    assert from_json(content) == FULL
    with pytest.raises(ValueError, match="no settings"):
        from_json({**content, "more": 1})
    del content["parameter_tasks"]
    with pytest.raises(ValueError, match="no settings"):
        from_json(content)
