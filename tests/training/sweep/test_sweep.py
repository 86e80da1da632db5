"""Many runs on one base: equal to runs of their own, resumable, with one step 1 for those that may share it."""

import csv
import json
import math

import pytest
import torch
from torch._dynamo.utils import counters

import lofit_fast as lf
from lofit_fast.patching.storage import read_adapter
from lofit_fast.tasks import Task, load_task
from lofit_fast.tasks.task import Preference
from lofit_fast.training.engine import compiled_layers
from lofit_fast.training.sweep import one_run as run_module
from lofit_fast.training.sweep import sweep_folder
from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.run import sweep
from lofit_fast.training.sweep.sweep_tables import failures
from tests.library_versions import PICTURES
from tests.tiny_models import HEADS, LAYERS, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.sweep.small_sweeps import BASE, grid_of, run

pytestmark = pytest.mark.usefixtures("bare")


def tensors(folder):
    return {key: value for key, value in read_adapter(folder / "adapter").tensors.items()}


def test_step_1_is_shared_and_the_runs_are_what_they_would_be_alone(data, tmp_path, trainings):
    grid = grid_of(data, seed=[1, 2], tune_lr=[1e-2, 2e-2])
    model = tiny_model("llama")
    rows = run(grid, tmp_path / "sweep", model)
    assert lf.handle_of(model) is None
    assert [stage for stage, _ in trainings] == ["select", "tune", "tune"] * 2
    assert [row["status"] for row in rows] == ["done"] * 4
    # the last of all, with its step 1 taken from another run, and the first, which trained it
    for planned, row in ((grid.runs[0], rows[0]), (grid.runs[3], rows[3])):
        task = load_task("completion", data, seed=42)
        alone = tmp_path / "alone" / planned.name
        fresh = tiny_model("llama")
        result = lf.fit(
            fresh,
            tiny_tokenizer(),
            task.train,
            planned.recipe,
            output_dir=alone,
            eval_data=task.validation,
            progress=False,
        )
        ours, theirs = tensors(tmp_path / "sweep" / "runs" / planned.name), tensors(alone)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert [tuple(pair) for pair in row["chosen_heads"]] == result.heads
        assert row["loss"] == result.history[-1]["loss"]


@pytest.mark.slow
def test_the_choice_of_heads_is_each_runs_own(data, tmp_path, trainings):
    rows = run(grid_of(data, top=[1, 3]), tmp_path)
    assert [row["n_heads"] for row in rows] == [1, 3]
    assert rows[0]["chosen_heads"] == rows[1]["chosen_heads"][:1]
    assert [stage for stage, _ in trainings] == ["select", "tune", "tune"]


@pytest.mark.slow
def test_what_step_1_depends_on_is_not_shared(data, tmp_path, trainings):
    run(grid_of(data, select_lr=[1e-3, 2e-3]), tmp_path)
    assert [stage for stage, _ in trainings] == ["select", "tune"] * 2


def test_a_sweep_leaves_its_tables(data, tmp_path):
    rows = run(grid_of(data, tune_lr=[1e-2, 2e-2]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"sweep.json", "sweep.csv", "sweep.md"}
    assert (tmp_path / "sweep.png").exists() == PICTURES
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept["runs"] == rows
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["tune_lr"] for row in table] == ["0.01", "0.02"]
    assert float(table[1]["loss"]) == rows[1]["loss"]
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert len(lines) == 2 + 2
    assert lines[0].startswith("| name | tune_lr | status | accuracy_after_select | accuracy_after_tune | loss")


def test_a_sweep_of_an_infinite_setting_leaves_plain_json(data, tmp_path):
    rows = run(grid_of(data, max_grad_norm=[math.inf]), tmp_path)
    text = (tmp_path / "sweep.json").read_text()
    kept = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert kept["runs"] == rows
    assert (rows[0]["status"], rows[0]["max_grad_norm"]) == ("done", "Infinity")


@pytest.mark.slow
def test_finished_runs_are_kept_and_new_ones_added(data, tmp_path, trainings):
    first = run(grid_of(data, tune_lr=[1e-2]), tmp_path)
    trainings.clear()
    rows = run(grid_of(data, tune_lr=[1e-2, 2e-2]), tmp_path)
    assert trainings == [("tune", 2e-2)]
    assert rows[0] == first[0]
    trainings.clear()
    run(grid_of(data, tune_lr=[1e-2]), tmp_path, resume=False)
    assert [stage for stage, _ in trainings] == ["select", "tune"]


def test_an_interrupted_sweep_goes_on(data, tmp_path, trainings, monkeypatch):
    fit, grid = run_module.fit_objective, grid_of(data, tune_lr=[1e-2, 2e-2])

    def interrupted(*args, output_dir, **options):
        if output_dir.name == "tune_lr=0.02":
            raise KeyboardInterrupt
        return fit(*args, output_dir=output_dir, **options)

    monkeypatch.setattr(run_module, "fit_objective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(grid, tmp_path)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == 1
    monkeypatch.setattr(run_module, "fit_objective", fit)
    trainings.clear()
    assert [row["status"] for row in run(grid, tmp_path)] == ["done", "done"]
    assert trainings == [("tune", 2e-2)]


@pytest.mark.slow
def test_a_sweep_goes_on_in_the_dtype_it_was_begun_in(data, tmp_path, trainings, monkeypatch):
    asked, rule = [], [torch.bfloat16]

    def load_model(name, *, dtype, device):
        asked.append(dtype)
        return tiny_model("llama").to(getattr(torch, dtype)), tiny_tokenizer()

    monkeypatch.setattr(run_module, "load_model", load_model)
    monkeypatch.setattr(sweep_folder, "best_dtype", lambda device: rule[0])
    for rates in ([1e-2], [1e-2, 2e-2]):
        rows = sweep(grid_of(data, tune_lr=rates), tmp_path, progress=False)
        assert [row["status"] for row in rows] == ["done"] * len(rates)
        # on another machine the rule says something else
        rule[0] = torch.float32
    assert asked == ["bfloat16", "bfloat16"]
    assert trainings == [("select", 5e-3), ("tune", 1e-2), ("tune", 2e-2)]
    sweep(grid_of(data, tune_lr=[1e-2]), tmp_path, progress=False, resume=False)
    assert asked[-1] == "float32"


def test_a_failing_run_is_recorded_and_the_others_go_on(data, tmp_path):
    model = tiny_model("llama")
    rows = run(grid_of(data, top=[2, 99, 3]), tmp_path, model)
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "top 99 heads" in rows[1]["error"]
    assert "1 of 3 runs failed: top=99: ValueError" in failures(rows)
    assert failures(rows[:1]) is None
    assert lf.handle_of(model) is None
    assert "failed" in (tmp_path / "sweep.md").read_text()


def sweep_of(task, folder, monkeypatch, **grid):
    monkeypatch.setattr(run_module, "load_task", lambda *a, **o: task)
    return run(parse_grid({"base": {**BASE, "task": task.name}, "grid": grid}), folder)


def test_a_task_with_nothing_to_train_on_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the task mmlu has nothing to train on"):
        sweep_of(Task("mmlu", [], []), tmp_path, monkeypatch, top=[2])


def test_preferences_are_swept_too_and_share_their_step_1(tmp_path, trainings, monkeypatch):
    pytest.importorskip("trl")
    pairs = tuple(Preference(f"Q: {a}? A:", f" {a}.", (" x!", " y!")) for a in "abcd")
    task = Task("truthfulqa", [], [], preferences=pairs)
    rows = sweep_of(task, tmp_path, monkeypatch, tune_lr=[1e-2, 2e-2])
    assert [row["status"] for row in rows] == ["done", "done"]
    assert trainings == [("select", 5e-3), ("tune", 1e-2), ("tune", 2e-2)]


def test_given_heads_skip_step_1(data, tmp_path, trainings):
    path = tmp_path / "heads.json"
    path.write_text("[[1, 2], [0, 0]]")
    grid = parse_grid({"base": {**BASE, "data": data}, "runs": [{"name": "given", "heads": str(path)}]})
    (row,) = run(grid, tmp_path / "sweep")
    assert row["chosen_heads"] == [[1, 2], [0, 0]]
    assert row["heads"] == str(path)
    assert [stage for stage, _ in trainings] == ["tune"]


def test_all_heads_skip_step_1(data, tmp_path, trainings):
    grid = parse_grid({"base": {**BASE, "data": data}, "runs": [{"name": "every", "heads": "all"}]})
    (row,) = run(grid, tmp_path / "sweep")
    assert len(row["chosen_heads"]) == LAYERS * HEADS
    assert [stage for stage, _ in trainings] == ["tune"]


@pytest.mark.slow
def test_train_sizes_are_drawn_once_each(data, tmp_path):
    rows = run(grid_of(data, train_size=[4, 8]), tmp_path)
    assert [row["train_size"] for row in rows] == [4, 8]
    history = [(tmp_path / "runs" / row["name"] / "history.jsonl").read_text().splitlines() for row in rows]
    assert [len(json.loads(lines[0])["step_losses"]) for lines in history] == [1, 2]


@pytest.mark.slow
def test_compiled_layers_serve_all_runs(data, tmp_path, monkeypatch, dynamo):
    # the compiler proper adds minutes and no graphs
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    model, graphs = tiny_model("llama"), []
    fit = run_module.fit_objective

    def counted(*args, **options):
        result = fit(*args, **options)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(run_module, "fit_objective", counted)
    before = counters["stats"]["unique_graphs"]
    rows = run(grid_of(data, {"compile": True}, tune_lr=[1e-2, 2e-2]), tmp_path, model)
    assert [row["status"] for row in rows] == ["done", "done"]
    assert before < graphs[0] == graphs[1]
