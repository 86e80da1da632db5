"""A sweep in several processes: the rows of one process, and a step 1 that is trained once for those that share it."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from lofit_fast.training.sweep import processes
from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.processes import in_order_of_need
from lofit_fast.training.sweep.run import sweep
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

SEEDS_AND_RATES = {"seed": [1, 2], "tune_lr": [1e-2, 2e-2]}


@pytest.fixture
def grid(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefghij"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "top": 2, "batch_size": 4}
    return parse_grid({"base": {**base, "select_epochs": 1, "tune_epochs": 1}, "grid": SEEDS_AND_RATES})


def logged(runs, failing=()):
    """(rows, what began and what ended in which order) of threads in the place of processes."""
    log = []

    def work(index):
        log.append(("begin", index))
        row = {"status": "failed" if index in failing else "done"}
        log.append(("end", index))
        return row

    with ThreadPoolExecutor(4) as pool:
        rows = dict(in_order_of_need(runs, pool, work, jobs=4))
    return rows, log


def runs_of(**grid):
    return parse_grid({"base": {"model": "tiny"}, "grid": grid}).runs


def test_one_run_trains_the_step_1_that_others_wait_for():
    rows, log = logged(runs_of(seed=[1, 2], tune_lr=[1e-2, 2e-2, 3e-2]))
    assert rows == dict.fromkeys(range(6), {"status": "done"})
    for leader in (0, 3):
        followers = [log.index(("begin", leader + later)) for later in (1, 2)]
        assert log.index(("end", leader)) < min(followers)


def test_the_next_takes_the_place_of_a_run_that_failed():
    rows, log = logged(runs_of(tune_lr=[1e-2, 2e-2, 3e-2, 4e-2]), failing={0, 1})
    assert [rows[index]["status"] for index in range(4)] == ["failed", "failed", "done", "done"]
    assert log == [(what, index) for index in range(4) for what in ("begin", "end")]


def test_runs_with_given_heads_wait_for_nobody(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("[[0, 0]]")
    barrier = threading.Barrier(2, timeout=30)

    def meeting(index):
        barrier.wait()
        return {"status": "done"}

    with ThreadPoolExecutor(2) as pool:
        rows = dict(in_order_of_need(runs_of(heads=[str(tmp_path / name) for name in "ab"]), pool, meeting, jobs=2))
    assert len(rows) == 2


def test_no_run_waits_in_the_pool():
    """What the pool holds cannot be taken back from it, should the sweep be stopped."""
    handed = []

    class Pool(ThreadPoolExecutor):
        def submit(self, work, index):
            handed.append(index)
            return super().submit(work, index)

    with Pool(2) as pool:
        rows = in_order_of_need(runs_of(seed=[1, 2, 3, 4, 5, 6]), pool, lambda index: {"status": "done"}, jobs=2)
        for ended, _ in enumerate(rows, start=1):
            assert len(handed) <= ended + 2


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(grid, tmp_path):
    one = sweep(grid, tmp_path / "one", progress=False)
    two = sweep(grid, tmp_path / "two", jobs=2, progress=False)
    assert [row["name"] for row in two] == [run.name for run in grid.runs]
    assert json.loads((tmp_path / "two" / "sweep.json").read_text())["runs"] == two
    assert len(list((tmp_path / "two" / "step1").iterdir())) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours["status"] == theirs["status"] == "done"
        assert ours["chosen_heads"] == theirs["chosen_heads"]
        # the number of threads may change the order of sums
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
def test_an_error_in_loading_the_base_is_the_callers(grid, tmp_path):
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model"):
        sweep(grid, tmp_path / "sweep", jobs=2, progress=False)


@pytest.mark.slow
def test_a_process_that_dies_says_what_to_do(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "row_of_run", os._exit)
    with pytest.raises(ChildProcessError, match="fewer jobs help"):
        sweep(grid, tmp_path / "sweep", jobs=2, progress=False)


@pytest.mark.slow
def test_workers_end_with_the_process_that_began_them():
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    worker = context.Process(target=processes.end_with, args=(watched,))
    worker.start()
    worker.join(0.5)
    assert worker.is_alive()
    held.close()
    worker.join(60)
    assert worker.exitcode == 1


@pytest.mark.parametrize(("options", "message"), [({"jobs": 0}, "at least one"), ({"jobs": 2, "base": ()}, "leave it")])
def test_jobs_that_cannot_be(grid, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(grid, tmp_path / "sweep", progress=False, **options)
    assert not (tmp_path / "sweep").exists()
