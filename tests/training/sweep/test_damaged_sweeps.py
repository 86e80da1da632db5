"""Damage in a sweep's folder is a row that says so, or is mended; the other runs are what they are without."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import lofit_fast as lf
from lofit_fast.locks import alone
from lofit_fast.training.sweep import one_run, sweep_folder
from lofit_fast.training.sweep.grid import read_grid
from lofit_fast.training.sweep.launched import Launch
from lofit_fast.training.sweep.run import sweep
from tests.damaging import VALUES, damaged
from tests.tiny_models import tiny_model
from tests.training.sweep.small_sweeps import grid_of, run, written_base, written_data

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(grid, a finished sweep of two runs, its rows)."""
    folder = tmp_path_factory.mktemp("sound")
    grid = grid_of(written_data(folder), tune_lr=[1e-2, 2e-2])
    return grid, folder / "sweep", run(grid, folder / "sweep")


@pytest.fixture
def again(sound, tmp_path):
    """(a copy of the finished sweep's folder, the first run's in it, what runs the sweep again on a bare base)."""
    grid, folder, rows = sound
    shutil.copytree(folder, tmp_path / "sweep")
    model = tiny_model("llama")

    def rerun():
        found = run(grid, tmp_path / "sweep", model)
        assert lf.handle_of(model) is None
        # whatever is wrong with the first, the second is what it was
        assert found[1] == rows[1]
        return found[0]

    return tmp_path / "sweep", tmp_path / "sweep" / "runs" / rows[0]["name"], rerun


def _without(name):
    return lambda folder: (folder / name).unlink()


def _as(name, text):
    return lambda folder: (folder / name).write_text(text)


# what befalls the files of a finished run that its result is read from
HARMS = {
    "no weights": _without("adapter/adapter_model.safetensors"),
    "no adapter": lambda folder: shutil.rmtree(folder / "adapter"),
    "cut weights": lambda folder: os.truncate(folder / "adapter" / "adapter_model.safetensors", 20),
    "an adapter of another kind": _as("adapter/adapter_config.json", '{"peft_type": "LORA"}'),
    "cut heads": _as("heads.json", '{"heads": [[0'),
    "heads of another kind": _as("heads.json", '{"heads": [1], "scores": null}'),
    "a cut history": _as("history.jsonl", '{"stage": "tune"'),
    "a state in depth": _as("state.json", "[" * 10**5),
    "half a state": _as("state.json", '{"stage": "done", "identity"'),
}


# the others are slow ones
_NOW = ("cut heads", "half a state")


@pytest.mark.parametrize("harm", [pytest.param(h, marks=[pytest.mark.slow] * (h not in _NOW)) for h in HARMS])
def test_a_damaged_finished_run_is_a_failed_row(again, harm):
    _, folder, rerun = again
    HARMS[harm](folder)
    row = rerun()
    assert row["status"] == "failed"
    assert row["error"].endswith(f"(without {folder} it is run again)")
    shutil.rmtree(folder)
    assert rerun()["status"] == "done"


def test_a_damaged_summary_is_written_anew(again, sound):
    _, folder, rerun = again
    expected = {key: value for key, value in sound[2][0].items() if key != "wall_seconds"}
    path = folder / "summary.json"
    content = path.read_bytes()
    for text in (
        b"{",
        b"[]",
        b'{"heads": [[0, 0]]}',
        content.replace(b'"loss": ', b'"loss": 1'),
        b"\xff",
        b"[" * 10**5,
    ):
        path.write_bytes(text)
        with pytest.warns(UserWarning, match="summary.json is not what this run has left: written anew"):
            row = rerun()
        assert {key: value for key, value in row.items() if key != "wall_seconds"} == expected
        assert json.loads(path.read_text())["heads"] == expected["chosen_heads"]


def test_damaged_tables_are_written_anew(again, sound):
    folder, _, rerun = again
    for content in [*damaged((folder / "sweep.json").read_bytes(), 2), json.dumps(VALUES[0]).encode()]:
        for name in ("sweep.json", "sweep.csv"):
            (folder / name).write_bytes(content)
        assert rerun() == sound[2][0]
        assert json.loads((folder / "sweep.json").read_text())["runs"] == sound[2]


@pytest.mark.parametrize("place", ["runs", "step1", "runs/tune_lr=0.01"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_link_out_of_the_folder_is_refused(data, tmp_path, place, resume):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("")
    link = tmp_path / "sweep" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{link} is a link"):
        run(grid_of(data, tune_lr=[1e-2]), tmp_path / "sweep", resume=resume)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_a_sweep_of_another_grid_in_the_folder_is_refused(data, tmp_path):
    folder = tmp_path / "sweep"
    with (
        sweep_folder.opened(folder, grid_of(data, tune_lr=[2e-2]), True, Launch(), lambda folder: "float32"),
        pytest.raises(BlockingIOError, match=f"cannot sweep in {folder}: process {os.getpid()} on host"),
    ):
        run(grid_of(data, tune_lr=[1e-2]), folder)
    assert not (folder / "runs").exists()


def test_a_sweep_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        run(grid_of(str(tmp_path / "nowhere.jsonl"), tune_lr=[1e-2]), tmp_path / "sweep")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_is_leaving_is_waited_for(data, tmp_path, monkeypatch):
    fit, refusals = one_run.fit_objective, iter([BlockingIOError("process 7 does so now")] * 2)

    def refused(*args, **options):
        for error in refusals:
            raise error
        return fit(*args, **options)

    monkeypatch.setattr(one_run, "fit_objective", refused)
    (row,) = run(grid_of(data, tune_lr=[1e-2]), tmp_path)
    assert row["status"] == "done"
    monkeypatch.setattr(one_run, "_ENDING_SECONDS", 0.0)
    refusals = iter([BlockingIOError("process 7 does so now")] * 2)
    (row,) = run(grid_of(data, tune_lr=[1e-2]), tmp_path)
    assert (row["status"], row["error"][:30]) == ("failed", "BlockingIOError: process 7 doe")


@pytest.mark.parametrize("found", ["float32", "bfloat16"])
def test_the_dtype_is_chosen_once(data, tmp_path, monkeypatch, found):
    grid = grid_of(data, tune_lr=[1e-2])
    monkeypatch.setattr(sweep_folder, "best_dtype", lambda device: getattr(torch, found))
    assert sweep_folder.shared_dtype(tmp_path, grid, True) == found
    monkeypatch.setattr(sweep_folder, "best_dtype", lambda device: pytest.fail("asked again"))
    (tmp_path / "sweep.json").write_text(json.dumps({"dtype": found}))
    assert sweep_folder.shared_dtype(tmp_path, grid, True) == found
    # damaged, or of an earlier release: the runs know
    (tmp_path / "sweep.json").write_text('{"dtype": "load"}')
    (tmp_path / "runs" / "tune_lr=0.01").mkdir(parents=True)
    (tmp_path / "runs" / "tune_lr=0.01" / "state.json").write_text(json.dumps({"identity": {"dtype": found}}))
    assert sweep_folder.shared_dtype(tmp_path, grid, True) == found
    asked = grid_of(data, {"dtype": "float16"}, tune_lr=[1e-2])
    assert sweep_folder.shared_dtype(tmp_path, asked, True) == "float16"


# a sweep in a process of its own, of which the test kills this process or a worker; each tells which runs it trains
SWEEP = """
import os, sys, time
from pathlib import Path
from lofit_fast.training.sweep import one_run
from lofit_fast.training.sweep.grid import read_grid
from lofit_fast.training.sweep.run import sweep
fit = one_run.fit_objective
def told(*args, output_dir, **options):
    with Path(sys.argv[1]).with_name("log").open("a") as log:
        log.write(f"{os.getpid()} {output_dir.name}\\n")
    return fit(*args, output_dir=output_dir, **options)
one_run.fit_objective = told
if __name__ == "__main__":
    here = Path(sys.argv[1]).parent
    (here / f"ready-{os.getpid()}").touch()
    # imports take seconds, in which another may do all there is to do
    while len(list(here.glob("ready-*"))) < int(sys.argv[4]):
        time.sleep(0.05)
    sweep(read_grid(sys.argv[1]), sys.argv[2], jobs=int(sys.argv[3]), progress=False)
"""


def trained(folder):
    """Which process has trained which run, of the sweeps in a folder."""
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def children_of(process):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def is_alive(process):
    """Whether a process runs; one that has ended may stay listed until somebody asks for it."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


@contextmanager
def begun(folder, grid, jobs, others=0):
    """A sweep in a process of its own, which does not outlive the scope. others: which it waits for."""
    (folder / "sweep.py").write_text(SWEEP)
    command = [sys.executable, folder / "sweep.py", grid, folder / "killed", str(jobs), str(1 + others)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def grid_file(tmp_path):
    """A sweep of four runs, each long enough to be killed in."""
    model, data = written_base(tmp_path), written_data(tmp_path)
    path = tmp_path / "grid.toml"
    path.write_text(
        f"""
        [base]
        model = "{model}"
        data = "{data}"
        top = 2
        batch_size = 4
        select_epochs = 2
        tune_epochs = 8
        [grid]
        seed = [1, 2]
        tune_lr = [1e-2, 2e-2]
        """
    )
    return path


def wait_for(what, seconds=600.0):
    for _ in range(int(seconds / 0.02)):
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def results(rows):
    # answers are judged in a process of its own alone: see `bare`
    left = ("wall_seconds", "accuracy_after_select", "accuracy_after_tune")
    return [{key: value for key, value in row.items() if key not in left} for row in rows]


# several processes begin, each of which imports torch
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("victim", ["parent", "worker", "interrupted"])
def test_a_sweep_that_is_killed_goes_on_to_the_same_rows(grid_file, tmp_path, victim):
    grid = read_grid(grid_file)
    # in this process, since each of its own takes seconds to begin
    whole = sweep(grid, tmp_path / "whole", progress=False)
    with begun(tmp_path, grid_file, 2) as process:
        wait_for(lambda: list((tmp_path / "killed").glob("runs/*/tune/checkpoint-*")))
        workers = children_of(process.pid)
        target = {"parent": process.pid, "worker": workers[-1], "interrupted": process.pid}[victim]
        os.kill(target, signal.SIGINT if victim == "interrupted" else signal.SIGKILL)
        _, said = process.communicate(timeout=600)
        assert (process.returncode == 0) == (victim == "worker")
    # nobody goes on, and nobody holds the folder
    wait_for(lambda: not any(map(is_alive, workers)), 60)
    with alone(tmp_path / "killed" / "sweep.lock", "look"):
        pass
    if victim == "worker":
        assert (
            "worker 2 of 2 has ended (its process died" in said or "worker 1 of 2 has ended (its process died" in said
        )
        kept = json.loads((tmp_path / "killed" / "sweep.json").read_text())["runs"]
        assert [row["status"] for row in kept] == ["done"] * 4
        # the one that it was in was taken up by the other
        runs = [name for _, name in trained(tmp_path)]
        assert len(runs) == 5 and len(set(runs)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = sweep(grid, tmp_path / "killed", progress=False)
    for row, expected in zip(results(rows), results(whole), strict=True):
        # the number of threads may change the order of sums
        assert row == {key: pytest.approx(x, rel=1e-5) if isinstance(x, float) else x for key, x in expected.items()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_sweeps_in_one_folder(grid_file, tmp_path):
    with begun(tmp_path, grid_file, 1, others=1) as first, begun(tmp_path, grid_file, 1, others=1) as second:
        said = [process.communicate(timeout=900)[1] for process in (first, second)]
        assert [process.returncode for process in (first, second)] == [0, 0]
    joined = [
        f"joining the sweep in {tmp_path / 'killed'}, where process {process.pid} on" for process in (second, first)
    ]
    assert [words in text for words, text in zip(joined, said, strict=True)].count(True) == 1
    rows = json.loads((tmp_path / "killed" / "sweep.json").read_text())["runs"]
    assert [row["status"] for row in rows] == ["done"] * 4
    log = trained(tmp_path)
    assert len({process for process, _ in log}) == 2
    assert sorted(name for _, name in log) == sorted(row["name"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_under_torchrun(grid_file, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "lofit_fast.cli", "sweep", grid_file, "--output", tmp_path / "sweep", "--json"]
    with grid_file.open() as grid:
        text = grid.read().replace("[base]", '[base]\n        device = "cpu"')
    grid_file.write_text(text)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "kernels"), str(root)])}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, timeout=1400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # one of the two prints
    rows = json.loads(done.stdout)["runs"]
    assert [row["status"] for row in rows] == ["done"] * 4
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"] == rows
    claims = [json.loads(path.read_text()) for path in (tmp_path / "sweep" / "queue" / "claims").glob("*.json")]
    claims = [claim for claim in claims if "progress" in claim]
    assert [claim["deaths"] for claim in claims] == [0] * 4
    assert len({claim["process"] for claim in claims}) == 2
