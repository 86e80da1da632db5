"""Cells are measured once per code, machine and options; what was interrupted goes on."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.speed import cells
from benchmarks.speed.__main__ import BUDGET, main, measured_cell, run_cells
from benchmarks.speed.cell_plan import CORE, PLANNED_MINUTES, memory_rows, plan
from benchmarks.speed.cells import Cell, Options, Store, code_digest, device_slug
from benchmarks.speed.ratios import STEPS, rewrite_summary, summarize, write_summary
from benchmarks.speed.step import packaged_models
from lofit_fast.models.load import ALIASES, Packaged
from tests.markdown_tables import cells_of as table_rows

CELLS = [Cell("m/one", lambda options: {"value": 1}, 1), Cell("m/two", lambda options: {"value": 2}, 30)]


@pytest.fixture
def store(tmp_path):
    return Store.here(tmp_path, Options(data="anywhere"))


class Runs:
    """Runs cells in this process and counts them; fails on those named."""

    def __init__(self, *failing):
        self.names, self.failing = [], failing

    def __call__(self, cell, into):
        self.names.append(cell.name)
        into.write_text(json.dumps(cell.measure(Options())))
        return cell.name not in self.failing


def test_a_finished_cell_is_not_measured_again(store):
    runs = Runs()
    assert run_cells(CELLS, store, runs, 45) == []
    assert run_cells(CELLS, store, runs, 45) == []
    assert runs.names == ["m/one", "m/two"]
    assert store.read("m/two")["value"] == 2
    assert store.read("m/two")["meta"].keys() >= {"commit", "dirty", "processor", "versions"}


def test_a_failed_cell_is_measured_again(store):
    assert run_cells(CELLS, store, Runs("m/one"), 45) == ["m/one"]
    assert store.read("m/one") is None
    runs = Runs()
    assert run_cells(CELLS, store, runs, 45) == []
    assert runs.names == ["m/one"]


def test_other_options_and_other_code_are_another_measurement(store, tmp_path):
    run_cells(CELLS, store, Runs(), 45)
    assert not Store.here(tmp_path, Options()).finished("m/one")
    assert not Store(store.folder, {**store.stamp, "code": "other"}).finished("m/one")
    assert Store.here(tmp_path, Options(data="elsewhere")).finished("m/one")


def test_what_does_not_fit_in_the_time_is_left_for_the_next_run(store):
    runs = Runs()
    assert run_cells(CELLS, store, runs, 20) == []
    assert runs.names == ["m/one"]
    run_cells(CELLS, store, runs, 45)
    assert runs.names == ["m/one", "m/two"]


def test_a_slow_machine_is_expected_to_stay_slow(store, monkeypatch):
    clock, cells = [0.0], [Cell(f"m/{n}", lambda options: {}, 10) for n in "abcd"]
    monkeypatch.setattr("benchmarks.speed.__main__.time.monotonic", lambda: clock[0])
    runs = Runs()

    def slowly(cell, into):
        clock[0] += 18 * 60
        return runs(cell, into)

    run_cells(cells, store, slowly, 45)
    # after 36 minutes another cell of ten fits by the plan, but not at this pace
    assert runs.names == ["m/a", "m/b"]


def test_an_absent_cell_says_why_and_is_looked_for_again(store):
    from benchmarks.peers.peer import Absent

    def absent(options):
        raise Absent("no such thing")

    content = measured_cell(Cell("m/none", absent, 1), Options())
    store.write("m/none", content, 0.1)
    assert store.read("m/none")["absent"] == "no such thing"
    assert not store.finished("m/none")


def test_a_model_that_is_not_installed_is_absent_and_says_how_to_install_it(monkeypatch):
    nowhere = Packaged(lambda: None, "pip install a-model")
    for alias in packaged_models.MODELS.values():
        monkeypatch.setitem(ALIASES, alias, nowhere)
    needing = [cell for cell in plan(full=True) if "/" in cell.name]
    for cell in needing:
        alias = packaged_models.MODELS[cell.name.split("/")[0]]
        expected = {"absent": f"the packaged model {alias!r} is not installed: pip install a-model"}
        assert measured_cell(cell, Options()) == expected, cell.name


def test_no_path_of_the_data_is_kept(store, tmp_path):
    run_cells(CELLS[:1], store, Runs(), 45)
    assert "anywhere" not in store.path("m/one").read_text()
    assert store.stamp["data"] == "CLUTRR"


def test_names_of_cells_and_machines(store):
    cells = plan(full=True)
    assert len({cell.name for cell in cells}) == len(cells)
    files = {store.path(cell.name).name for cell in cells}
    assert len(files) == len(cells) and not any(" " in name or "/" in name for name in files)
    assert "SmolLM2-135M.memory-hook-step-1.json" in files
    assert {cell.name for cell in plan(full=False)} < {cell.name for cell in cells}
    assert device_slug({"device": "cpu", "processor": "AMD EPYC(TM) 9", "threads": 2}) == "amd-epyc-tm-9-2-threads"
    assert device_slug({"device": "NVIDIA H100 80GB", "processor": "x", "threads": 2}) == "nvidia-h100-80gb"


def test_all_of_make_bench_fits_into_one_call():
    assert sum(cell.minutes for cell in plan(full=False)) <= PLANNED_MINUTES < BUDGET
    assert {cell.name for cell in plan(full=False, models=["Gemma-3-270M"])} <= {cell.name for cell in plan(full=True)}


def test_a_careful_users_loop_is_measured_with_the_first_model():
    assert "SmolLM2-135M/careful steps" in {cell.name for cell in plan(full=False)}


def test_the_pages_minutes_are_the_plans():
    page = (cells.ROOT / "docs" / "benchmark.md").read_text().partition("## Where the minutes of")[2]
    heads = ("SmolLM2-135M/", "Gemma-3-270M/")
    shown = {}
    for name, *minutes in table_rows(page)[1:]:
        named = [name] if name == "ops" else [head + name for head in heads]
        shown |= {cell: float(each) for cell, each in zip(named, minutes, strict=False) if each != "full"}
    planned = {cell.name: cell.minutes for cell in plan(full=False)}
    assert shown == planned
    assert f"The sum is {sum(planned.values()):.1f}." in page
    assert f"with {PLANNED_MINUTES:.0f} for all cells" in page


def test_the_digest_sees_the_code_and_not_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    (tmp_path / "lofit_fast").mkdir()
    code, report = tmp_path / "lofit_fast" / "patch.py", tmp_path / "lofit_fast" / "bench_report.py"
    seen = []
    for path, text in ((code, "1"), (report, "1"), (report, "2"), (code, "2"), (code, "1")):
        path.write_text(text)
        seen.append(code_digest())
    assert seen[0] == seen[1] == seen[2] == seen[4] != seen[3]


def row(peer, setting, step, seconds):
    return {"peer": peer, "setting": setting, "step": step, "seconds": seconds}


def cells_of(model):
    """What the cells of a model hold, as far as the summary reads them."""
    ours, hook = "same engine", "as run"
    steps = [
        row("ours", ours, "step 1", [2.0, 2.0, 2.0]),
        row("ours", ours, "step 2", [1.0, 1.0, 1.0]),
        row("ours", "int8", "step 1", [1.0, 1.0, 1.0]),
        row("ours", "int8", "step 2", [0.8, 0.8, 0.8]),
        row("floor", ours, "", [1.0, 1.0, 0.5]),
        row("hook", ours, "step 1", [2.2, 2.2, 2.2]),
        row("hook", ours, "step 2", [0.9, 0.9, 0.9]),
        row("hook", hook, "step 1", [8.0, 10.0, 12.0]),
        row("hook", hook, "step 2", [6.0, 7.0, 8.0]),
        row("lora_all", hook, "", [9.0, 9.0, 9.0]),
    ]
    cells = {
        f"{model}/steps": {"rows": steps},
        f"{model}/prefix cache": {"rows": [row("off", ours, "", [4.0, 4.0]), row("on", ours, "", [2.0, 2.0])]},
        f"{model}/scoring": {"absent": "not built"},
        f"{model}/answer only": {
            "steps": {
                step: {"speedup": {"median": 7.0 + at, "low": 6.0, "high": 9.0}, "speedup_with_filling": 5.0 + at}
                for at, step in enumerate(STEPS)
            }
        },
        f"{model}/fast run": {
            "ours": {"seconds": 2.0},
            "whole_run_seconds": {peer: [8.0, 12.0] for peer in ("hook", "lora_all")},
        },
        f"{model}/careful steps": {
            "rows": [
                row("ours", ours, "step 2", [1.0, 1.0, 1.0]),
                row("hook", "tuned stock", "step 2", [5.0, 5.0, 5.0]),
                row("lora_all", "tuned stock", "", [6.0, 6.0, 6.0]),
            ]
        },
    }
    peaks = {("ours", "step 1"): 3, ("ours", "step 2"): 2, ("hook", "step 1"): 10, ("hook", "step 2"): 8}
    for each in (row for step in STEPS for row in memory_rows(step)):
        peak = peaks[each.peer, each.step]
        content = {"peer": each.peer, "step": each.step, "first_peak": peak, "steady_peak": peak / 2}
        cells[f"{model}/memory {each.peer} {each.step}"] = content
    return cells


def test_the_summary_carries_the_worse_row():
    summary = summarize(cells_of("M").get, "M")
    assert summary["vs_hook_as_run"] == 5.0
    assert (summary["vs_hook_as_run_interval"], summary["vs_hook_as_run_rounds"]) == ([4.0, 6.0], 3)
    assert summary["fast_run_vs_hook_rounds"] == 2
    assert summary["vs_hook_as_run_rows"]["step 2"]["median"] == 7.0
    assert summary["vs_lora_all_as_run"] == 4.5
    assert summary["vs_floor"] == 2.0
    assert summary["int8_speedup"] == 1.25 and summary["vs_hook_as_run_int8"] == 8.75
    assert (summary["vs_hook_tuned_stock"], summary["vs_lora_all_tuned_stock"]) == (5.0, 6.0)
    assert (summary["answer_only_epoch_speedup"], summary["fast_run_vs_hook_interval"]) == (5.0, [4.0, 6.0])
    assert summary["answer_only_epoch_speedup_filled"] == 7.0
    assert summary["peak_memory_vs_hook"] == pytest.approx(0.3)
    assert summary["prefix_cache_speedup"] == 2.0
    assert summary["mc_scoring_speedup"] is None
    assert summary["absent"] == {"scoring": "not built"}


def test_memory_is_the_larger_of_both_peaks():
    cells = cells_of("M")
    cells["M/memory ours step 2"] |= {"first_peak": 2, "steady_peak": 4}
    cells["M/memory hook step 1"] |= {"first_peak": 10, "steady_peak": 12}
    summary = summarize(cells.get, "M")
    assert summary["peak_memory_vs_hook"] == pytest.approx(4 / 8)
    assert summary["peak_memory_vs_hook_rows"]["step 1"]["peak"] == pytest.approx(3 / 12)


def test_a_summary_is_written_again_from_its_own_cells(store, tmp_path):
    first = write_summary(tmp_path, store, ["M/steps"])
    content = json.loads(first.read_text())
    content["meta"] |= {"processor": "of another machine", "stamp": {"code": "another's"}}
    first.write_text(json.dumps(content))
    seconds = {"per_answer": [9.0], "packed": [1.0]}
    cell = {"cell": "SmolLM2-135M/scoring", "stamp": {"code": "another's"}, "seconds": seconds}
    path = store.path("SmolLM2-135M/scoring")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(cell))
    again = json.loads(rewrite_summary(tmp_path).read_text())
    assert again["SmolLM2-135M"]["mc_scoring_speedup"] == 9
    assert again["meta"] == content["meta"]


def test_a_hook_in_our_engine_is_of_the_steps_or_else_of_the_peers():
    cells = cells_of("M")
    summary = summarize(cells.get, "M")
    assert summary["vs_hook_same_engine"] == pytest.approx(0.9)
    assert list(summary["vs_hook_same_engine_rows"]) == list(STEPS)
    rows = cells["M/steps"]["rows"]
    cells["M/steps"]["rows"] = [one for one in rows if (one["peer"], one["setting"]) != ("hook", "same engine")]
    assert summarize(cells.get, "M")["vs_hook_same_engine"] is None
    pair = [row("ours", "same engine", STEPS[0], [2.0]), row("hook", "same engine", STEPS[0], [1.9])]
    cells["M/peers same engine"] = {"rows": pair}
    summary = summarize(cells.get, "M")
    assert summary["vs_hook_same_engine"] == pytest.approx(0.95)
    assert list(summary["vs_hook_same_engine_rows"]) == [STEPS[0]]


def test_a_hook_in_our_engine_is_among_the_steps():
    in_our_engine = {row.step for row in CORE if (row.peer, row.setting) == ("hook", "same engine")}
    assert in_our_engine == set(STEPS)


def test_a_row_alone_is_no_summary():
    cells = cells_of("M")
    cells["M/steps"]["rows"][0].pop("seconds")
    summary = summarize(cells.get, "M")
    assert summary["vs_hook_as_run"] is None
    assert list(summary["vs_hook_as_run_rows"]) == [STEPS[1]]


def test_products_in_8_bits_are_promised_of_step_2():
    cells = cells_of("M")
    rows = cells["M/steps"]["rows"]
    cells["M/steps"]["rows"] = [one for one in rows if (one["setting"], one["step"]) != ("int8", "step 1")]
    summary = summarize(cells.get, "M")
    assert summary["int8_speedup"] == 1.25 and list(summary["int8_speedup_rows"]) == ["step 2"]
    assert summary["vs_hook_as_run_int8"] is None


def test_the_summary_has_every_key_whatever_was_measured(store, tmp_path):
    summary = json.loads(write_summary(tmp_path, store, ["M/steps"]).read_text())
    keys = {"vs_hook_as_run", "vs_lora_all_as_run", "vs_floor", "peak_memory_vs_hook"}
    keys |= {"prefix_cache_speedup", "mc_scoring_speedup", "int8_speedup", "vs_hook_as_run_int8"}
    keys |= {"answer_only_epoch_speedup", "fast_run_vs_hook", "fast_run_vs_lora_all"}
    keys |= {"fast_run_all_positions_vs_hook", "fast_run_all_positions_vs_lora_all"}
    assert all(keys <= summary[model].keys() for model in ("SmolLM2-135M", "Gemma-3-270M"))
    assert summary["meta"].keys() >= {"device", "versions", "commit", "results", "data", "evidence"}
    assert summary["meta"]["planned"] == ["M/steps"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "smollm2"], "unknown --model smollm2: expected of SmolLM2-135M"),
        (["--only", "stepz"], "no cell has stepz in its name"),
    ],
)
def test_what_matches_nothing_is_refused_and_nothing_is_written(tmp_path, arguments, message):
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path)], env={"COLUMNS": "1000"})
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []
