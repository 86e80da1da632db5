"""A sweep in several processes: the rows of one process, and a step 1 that is trained once for those that share it."""

import json
import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest

from lofit_fast.training.sweep import processes
from lofit_fast.training.sweep import run as run_module
from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.run import sweep
from tests.training.sweep.small_sweeps import written_base, written_data

SEEDS_AND_RATES = {"seed": [1, 2], "tune_lr": [1e-2, 2e-2]}


def dying(*_):
    os._exit(1)


@pytest.fixture
def grid(tmp_path):
    base = {"model": written_base(tmp_path), "data": written_data(tmp_path), "top": 2, "batch_size": 4}
    return parse_grid({"base": {**base, "select_epochs": 1, "tune_epochs": 1}, "grid": SEEDS_AND_RATES})


def ended_with(*errors):
    futures = {}
    for number, error in enumerate(errors):
        future = Future()
        future.set_result(None) if error is None else future.set_exception(error)
        futures[future] = number
    return futures


def test_workers_that_fail_are_told_of_and_left(caplog):
    """Futures in the place of processes."""
    devices = ("cuda:0", "cuda:1", "cuda:2")
    slow = Future()
    running = ended_with(BrokenProcessPool("died"), ValueError("no such model")) | {slow: 2}
    looks = iter([False] * 2)

    def look():
        if (all_ended := next(looks, True)) and not slow.done():
            slow.set_result(None)
        return all_ended

    processes._watch(running, devices, look)
    assert "worker 1 of 3 on cuda:0 has ended (its process died" in caplog.text
    assert "worker 2 of 3 on cuda:1 has ended (ValueError: no such model): the others go on" in caplog.text


def test_when_no_worker_is_left_the_reason_is_raised():
    died = BrokenProcessPool("died")
    with pytest.raises(ValueError, match="no such model"):
        processes._watch(ended_with(died, ValueError("no such model")), (None, None), lambda: False)
    with pytest.raises(ChildProcessError, match="one of 2 processes died, and so did all others"):
        processes._watch(ended_with(died, died), (None, None), lambda: False)
    # elsewhere somebody has done the rest
    processes._watch(ended_with(died, died), (None, None), lambda: True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"jobs": 2}, {"devices": "cpu,cpu"}])
def test_two_processes_give_the_rows_of_one(grid, tmp_path, how):
    one = sweep(grid, tmp_path / "one", progress=False)
    two = sweep(grid, tmp_path / "two", progress=False, **how)
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
    monkeypatch.setattr(run_module, "work", dying)
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
    # it imports all of torch first
    worker.join(250)
    assert worker.exitcode == 1


@pytest.mark.parametrize(("options", "message"), [({"jobs": 0}, "at least one"), ({"jobs": 2, "base": ()}, "leave it")])
def test_jobs_that_cannot_be(grid, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(grid, tmp_path / "sweep", progress=False, **options)
    assert not (tmp_path / "sweep").exists()
