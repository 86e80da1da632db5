"""Several processes, or threads in their place, on one sweep: every run once, by one; what died is taken up."""

import json
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import pytest

from lofit_fast.files import write_json
from lofit_fast.training.sweep import claims, membership, run_queue
from lofit_fast.training.sweep import run as run_module
from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.launched import Launch
from lofit_fast.training.sweep.run import sweep
from lofit_fast.training.sweep.run_queue import RunQueue
from lofit_fast.training.sweep.sweep_folder import opened


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without waits that are for people and file servers."""
    monkeypatch.setattr(run_queue, "_LOOK", 0.01)
    monkeypatch.setattr(claims, "SILENCE", 0.2)
    monkeypatch.setattr(run_module, "can_draw", lambda: False)


def grid_of(**axes):
    return parse_grid({"base": {"model": "tiny", "dtype": "float32"}, "grid": axes})


def begun(folder, grid, resume=True, launch=None):
    """A scope of one process in a sweep: (folder, session)."""
    return opened(folder, grid, resume, launch or Launch(), lambda folder: "float32")


class Stub:
    """In the place of a Runner: notes what it is asked to train, who asks, and whether a step 1 is there.

    It leaves no finished run, so a call that began after the others had ended would train all of them again: `together`
    is a barrier at which every call of the sweep is in it.
    """

    def __init__(self, grid, folder, base=None, *, together, **options):
        self.folder = folder
        together.wait(timeout=60)

    def __call__(self, run, resume):
        with (self.folder / "log").open("a") as log:
            log.write(f"begin {run.name} {resume} {threading.get_ident()}\n")
        time.sleep(0.01)
        place = self.folder / "runs" / run.name
        place.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("a") as log:
            log.write(f"heads {run.name}\n")
        (place / "heads.json").write_text("{}")
        time.sleep(0.01)
        with (self.folder / "log").open("a") as log:
            log.write(f"end {run.name}\n")
        return {"name": run.name, **run.varied, "status": "done"}


def tables_of(calls, grid, folder, monkeypatch):
    """What as many calls of `sweep` at once return."""
    monkeypatch.setattr(run_module, "Runner", partial(Stub, together=threading.Barrier(calls)))
    with ThreadPoolExecutor(calls) as pool:
        tables = [pool.submit(sweep, grid, folder, progress=False) for _ in range(calls)]
        return [table.result() for table in tables]


def logged(folder):
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_several_calls_train_every_run_once_and_all_return_all_rows(tmp_path, monkeypatch):
    grid, folder = grid_of(select_lr=[1e-3, 2e-3, 3e-3], seed=[1, 2]), tmp_path / "sweep"
    tables = tables_of(3, grid, folder, monkeypatch)
    begun_runs = [words[1:] for words in logged(folder) if words[0] == "begin"]
    assert sorted(name for name, *_ in begun_runs) == sorted(run.name for run in grid.runs)
    assert len({thread for *_, thread in begun_runs}) > 1
    assert tables[0] == tables[1] == tables[2]
    assert [row["name"] for row in tables[0]] == [run.name for run in grid.runs]
    assert json.loads((folder / "sweep.json").read_text())["runs"] == tables[0]
    assert list((folder / "queue" / "members").iterdir()) == []


def test_runs_wait_for_the_step_1_that_another_trains_for_them(tmp_path, monkeypatch):
    tables_of(4, grid_of(seed=[1, 2], tune_lr=[1e-2, 2e-2, 3e-2]), tmp_path, monkeypatch)
    log = [words[:2] for words in logged(tmp_path)]
    assert sorted(what for what, _ in log) == ["begin"] * 6 + ["end"] * 6 + ["heads"] * 6
    for seed in ("seed=1", "seed=2"):
        of_seed = [what for what, name in log if name.startswith(seed)]
        # the first has its heads before any other begins
        assert of_seed[:2] == ["begin", "heads"]


def test_the_next_trains_the_step_1_where_the_first_has_failed(tmp_path):
    grid = grid_of(tune_lr=[1e-2, 2e-2, 3e-2])
    with begun(tmp_path, grid) as (folder, session):
        first, second = (RunQueue(grid, session, folder / "runs") for _ in range(2))
        with closing(first.taken()) as mine:
            assert next(mine).index == 0
            with ExitStack() as held:
                assert second._take(1, {}, set(), held) is None
            first.end(0, {"name": grid.runs[0].name, "status": "failed"})
            assert next(mine).index == 1
            (folder / "runs" / grid.runs[1].name).mkdir(parents=True)
            (folder / "runs" / grid.runs[1].name / "heads.json").touch()
            # while that one is at work still
            with closing(second.taken()) as theirs:
                assert next(theirs).index == 2


def test_a_bundle_is_of_runs_that_are_alike_and_nobodys(tmp_path):
    grid = grid_of(tune_lr=[1e-2, 2e-2, 3e-2, 4e-2], positions=["all", "answer"])
    with begun(tmp_path, grid) as (folder, session):
        queue, other = (RunQueue(grid, session, folder / "runs") for _ in range(2))
        found = []
        with ExitStack() as elsewhere:
            assert other._take(2, {}, set(), elsewhere).run.recipe.positions == "all"
            # whoever has it has the step 1 of its like, too
            with closing(queue.bundles(3, lambda run: run.recipe.positions)) as bundles:
                assert [taken.index for taken in next(bundles)] == [1, 3, 5]
        with closing(queue.bundles(3, lambda run: run.recipe.positions)) as bundles:
            for bundle in bundles:
                found.append([taken.index for taken in bundle])
                for taken in bundle:
                    queue.end(taken.index, {"name": taken.run.name, "status": "done"})
        assert found == [[0, 2, 4], [1, 3, 5], [6], [7]]


def forked(work):
    """The exit status of a forked process that does it; a kill is negative."""
    with warnings.catch_warnings():
        # newer Pythons warn where there are threads: the child computes with one of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_the_run_of_a_killed_process_is_taken_up_and_gone_on_with(tmp_path):
    grid = grid_of(seed=[1, 2])

    def killed():
        with (
            begun(tmp_path, grid, resume=False) as (folder, session),
            closing(RunQueue(grid, session, folder / "runs").taken()) as taken,
        ):
            next(taken)
            os.kill(os.getpid(), signal.SIGKILL)

    # this one is in the sweep before and after, so it stays one sweep
    with begun(tmp_path, grid, resume=False) as (folder, session):
        queue = RunQueue(grid, session, folder / "runs")
        assert forked(killed) == -signal.SIGKILL
        with closing(queue.taken()) as taken:
            first = next(taken)
            assert (first.index, first.resume) == (0, True)
            queue.end(0, {"name": "0", "status": "done"})
            # nobody has begun the other
            assert (lambda taken: (taken.index, taken.resume))(next(taken)) == (1, False)


def test_a_run_in_which_every_process_dies_is_given_up(tmp_path):
    grid = grid_of(seed=[1])
    with begun(tmp_path, grid) as (folder, session):
        queue = RunQueue(grid, session, folder / "runs")

        def killed():
            taken = queue.taken()
            next(taken)
            os.kill(os.getpid(), signal.SIGKILL)

        # one that came further is no sign of a run that kills
        place = folder / "runs" / grid.runs[0].name
        place.mkdir(parents=True)
        for epoch in (0, 0, 1, 1):
            (place / "history.jsonl").write_text("line\n" * epoch)
            assert forked(killed) == -signal.SIGKILL
        assert queue.rows() == {}
        forked(killed)
        assert list(queue.taken()) == []
        (row,) = queue.rows().values()
    assert row["status"] == "failed"
    assert "3 processes have died in this run" in row["error"]
    assert "on host" in row["error"]


def test_an_interrupt_is_no_death(tmp_path):
    grid = grid_of(seed=[1])
    with begun(tmp_path, grid) as (folder, session):
        for _ in range(run_queue.MOST_DEATHS + 1):
            with pytest.raises(KeyboardInterrupt), closing(RunQueue(grid, session, folder / "runs").taken()) as taken:
                next(taken)
                raise KeyboardInterrupt
        with claims.claimed(session.queue / "claims", grid.runs[0].name) as claim:
            assert (claim.begun, claim.deaths) == (True, 0)


def test_a_row_that_is_not_whole_is_made_again(tmp_path):
    grid = grid_of(seed=[1])
    with begun(tmp_path, grid) as (folder, session):
        queue = RunQueue(grid, session, folder / "runs")
        (session.queue / "rows" / f"{grid.runs[0].name}.json").write_text('{"name"')
        with closing(queue.taken()) as taken:
            next(taken)
            queue.end(0, {"name": "x", "status": "done"})
            assert next(taken, None) is None


def of_another_host(folder, **changes):
    kept = {"host": "elsewhere", "process": 7, "held": True, "deaths": 0, "progress": 0, **changes}
    write_json(folder / "mine.json", kept)


def test_a_dead_process_of_another_host_is_told_from_a_living_one(tmp_path):
    of_another_host(tmp_path)
    with claims.claimed(tmp_path, "mine") as claim:
        assert (claim.begun, claim.deaths, claim.by) == (True, 1, "process 7 on host elsewhere")
    of_another_host(tmp_path)
    ended = threading.Event()

    def living():
        while not ended.wait(0.01):
            os.utime(tmp_path / "mine.json")

    thread = threading.Thread(target=living)
    thread.start()
    try:
        with pytest.raises(OSError, match="do not reach between hosts: process 7 on host elsewhere"):
            claims.claimed(tmp_path, "mine").__enter__()
    finally:
        ended.set()
        thread.join()


def test_a_claim_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with claims.claimed(tmp_path, "mine"):
        before = claims._touched(tmp_path / "mine.json")
        time.sleep(0.1)
        assert claims._touched(tmp_path / "mine.json") > before


def test_another_grid_other_libraries_and_starting_over_are_refused(tmp_path, monkeypatch):
    grid = grid_of(seed=[1])
    with begun(tmp_path, grid):
        me = f"process {os.getpid()} on host"
        with pytest.raises(BlockingIOError, match=f"{me} .* sweeps another grid there"):
            begun(tmp_path, grid_of(seed=[2])).__enter__()
        with pytest.raises(BlockingIOError, match="cannot start over"):
            begun(tmp_path, grid, resume=False).__enter__()
        # the device may be each process's own
        with begun(tmp_path, replace(grid, device="cpu")) as (_, session):
            assert len(session.others) == 1
            assert not session.begun_here
        other = {**membership.shared_versions(), "torch": "1.0"}
        monkeypatch.setattr(membership, "shared_versions", lambda: other)
        with pytest.raises(ValueError, match="got torch 1.0 here and torch 2"):
            begun(tmp_path, grid).__enter__()
    # nobody is there any more
    with begun(tmp_path, grid_of(seed=[2]), resume=False) as (_, session):
        assert session.begun_here


def test_a_late_process_of_a_job_belongs_to_the_sweep_of_the_others(tmp_path):
    grid = grid_of(seed=[1])
    jobs = [Launch(job=job, member=member) for job, member in (("slurm 1", "0"), ("slurm 1", "1"), ("slurm 2", "1"))]
    for launch, left in ((jobs[0], 0), (jobs[1], 1), (jobs[1], 0), (jobs[2], 0)):
        with begun(tmp_path, grid, resume=False, launch=launch) as (folder, session):
            queue = RunQueue(grid, session, folder / "runs")
            assert len(queue.rows()) == left
            queue.end(0, {"name": "x", "status": "failed"})


def test_a_sweep_of_which_all_are_dead_begins_anew(tmp_path):
    grid = grid_of(seed=[1])

    def killed():
        scope = begun(tmp_path, grid)
        scope.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL
    assert len(list((tmp_path / "queue" / "members").glob("*.lock"))) == 1
    with begun(tmp_path, grid_of(seed=[2])) as (_, session):
        assert session.begun_here


def test_runs_of_one_head_and_of_all_heads_share_no_step_1():
    grid = parse_grid({"base": {"model": "tiny"}, "grid": {"select": ["early_stop"], "top": [1, 1.0]}})
    one, every = (run_queue.step1_of(number, run) for number, run in enumerate(grid.runs))
    assert one != every
    assert one == run_queue.step1_of(7, grid.runs[0])
