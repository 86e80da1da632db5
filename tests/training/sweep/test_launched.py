"""How a sweep is started, on what its workers are put, and what they see of the environment."""

import os
import socket

import pytest

from lofit_fast.training.sweep import meeting
from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.launched import Launch, launched, worker_environment
from lofit_fast.training.sweep.run import workers_of
from lofit_fast.training.sweep.worker_devices import inside, launched_device, worker_devices
from tests.several_processes import in_processes

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_ID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "1"}


def grid_of(runs=4, **base):
    return parse_grid({"base": {"model": "tiny", **base}, "grid": {"seed": list(range(runs))}})


@pytest.fixture
def under(monkeypatch):
    """Called with variables: how a process that has them, and none of the launchers' others, was started."""
    for name in (*TORCHRUN, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def launched_with(**variables):
        with monkeypatch.context() as changed:
            for name, value in variables.items():
                changed.setenv(name, value)
            return launched()

    return launched_with


def test_alone(under):
    assert under() == under(RANK="0") == Launch()


def test_by_torchrun(under):
    launch = under(**TORCHRUN, TORCHELASTIC_RUN_ID="abc", TORCHELASTIC_RESTART_COUNT="1")
    assert launch == Launch(5, 8, 1, 4, "torchrun abc 1", "5", meets=True)
    unnamed = under(**TORCHRUN, TORCHELASTIC_RUN_ID="none")
    assert unnamed.job == f"torchrun {socket.gethostname()} {os.getppid()} 0"
    assert not under(**{**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}).meets


def test_by_slurm(under):
    # the batch script's own process, whatever the job's tasks are
    assert under(**SLURM, SLURM_NTASKS="8") == Launch(job="slurm 77  0", member=" 0")
    array = {**SLURM, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "1"}
    assert under(**array) == Launch(job="slurm 70  1", member="3 0")
    task = {**SLURM, **SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    # srun may tell its tasks of each other as MPI does
    for more in ({}, {"PMI_RANK": "3", "PMI_SIZE": "6"}):
        assert under(**task, **more) == Launch(3, 6, 1, 2, "slurm 77 2 0", " 3")


@pytest.mark.parametrize("changed", [{"RANK": "x"}, {"RANK": "8"}])
def test_variables_that_cannot_be(under, changed):
    with pytest.raises(ValueError, match=r"RANK|process 8 of 8"):
        under(**{**TORCHRUN, **changed})
    with pytest.raises(ValueError, match="SLURM_PROCID to be a whole number, got '-1'"):
        under(**{**SLURM, **SRUN, "SLURM_PROCID": "-1"})


def four():
    return "cuda", 4


def none():
    return "cpu", 0


@pytest.mark.parametrize(
    ("asked", "here", "devices"),
    [
        ("0,1", four, ("cuda:0", "cuda:1")),
        (" 3, cuda:0 ,cuda", four, ("cuda:3", "cuda:0", "cuda:0")),
        ([2, "1"], four, ("cuda:2", "cuda:1")),
        ("cpu,cpu", none, ("cpu", "cpu")),
        ("cpu", four, ("cpu",)),
    ],
)
def test_devices(asked, here, devices):
    assert worker_devices(asked, here) == devices


@pytest.mark.parametrize(
    ("asked", "here", "message"),
    [
        ("4", four, "'4' is not here, expected one of: cuda:0, cuda:1, cuda:2, cuda:3"),
        ("0", none, "'0' is not here, expected one of: no accelerator, so only cpu"),
        ("cuda:9", four, "'cuda:9' is not here"),
        ("xpu:0", four, "'xpu:0' is not here"),
        ("cuda:x", four, "'cuda:x' is not here"),
        ("cpu:1", none, "'cpu:1' is not here"),
        ("-1", four, "'-1' is not here"),
        ("all", four, "'all' is not here"),
        ("", four, "expected devices like"),
        ("0,,1", four, "expected devices like"),
        ([], four, "expected devices like"),
        ("0,cpu", four, "devices of one kind"),
    ],
)
def test_devices_that_cannot_be(asked, here, message):
    with pytest.raises(ValueError, match=message):
        worker_devices(asked, here)


def test_the_device_of_one_of_several_processes():
    assert launched_device(Launch(5, 8, 1, 4, meets=True), four) == "cuda:1"
    assert launched_device(Launch(5, 8, 1, 4, meets=True), none) == "cpu"
    # srun shows each task its own alone
    for meets in (False, True):
        assert launched_device(Launch(3, 6, 1, 2, meets=meets), lambda: ("cuda", 1)) == "cuda:0"
    with pytest.raises(ValueError, match="got 5 processes on a machine of 4 cuda devices"):
        launched_device(Launch(4, 5, 4, 5, meets=True), four)


def test_a_worker_sees_its_own_device_and_no_launcher(monkeypatch):
    for name, value in {**TORCHRUN, "TORCHELASTIC_RUN_ID": "1", "ACCELERATE_USE_FSDP": "true", "PMI_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    before = dict(os.environ)
    with worker_environment("cuda:1"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
        assert set(before) - set(os.environ) == {*TORCHRUN, "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP", "PMI_SIZE"}
    assert dict(os.environ) == before
    with worker_environment("cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with worker_environment(None):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4, 6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with worker_environment("cuda:1"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    with worker_environment("xpu:2"):
        assert os.environ["ZE_AFFINITY_MASK"] == "2"
    assert [inside(device) for device in ("cuda:3", "xpu:1", "cpu", None)] == ["cuda:0", "xpu:0", "cpu", None]


ON_ONE = Launch(1, 2, 1, 2, meets=True)
EACH_ON_ITS_OWN = Launch(1, 2, 0, 1, meets=True)


def test_workers_of_a_call():
    assert workers_of(grid_of(), None, 1, None, Launch()) is None
    assert workers_of(grid_of(2), None, 3, None, Launch()) == (None, None)
    assert workers_of(grid_of(), None, 1, "cpu,cpu", Launch()) == ("cpu", "cpu")
    assert workers_of(grid_of(device="cpu"), None, 1, None, ON_ONE) == ("cpu",)
    # one process per machine may have several devices there
    assert workers_of(grid_of(), None, 1, "cpu,cpu", EACH_ON_ITS_OWN) == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("given", "launch", "message"),
    [
        ((0, None), Launch(), "at least one job, got 0"),
        ((2, "cpu,cpu"), Launch(), "got jobs and devices"),
        ((1, "cpu,cpu"), ON_ONE, "got devices and processes of one launch"),
        ((2, None), ON_ONE, "got jobs and processes of one launch"),
        ((2, "cpu"), EACH_ON_ITS_OWN, "got jobs and devices"),
        ((1, "cpu,cpu,cpu"), Launch(), "got 3 devices for 2 runs"),
        ((1, None), Launch(0, 3), "got 3 processes for 2 runs"),
    ],
)
def test_workers_that_cannot_be(given, launch, message):
    with pytest.raises(ValueError, match=message):
        workers_of(grid_of(2), None, *given, launch)


def test_workers_beside_a_device_or_a_loaded_base():
    with pytest.raises(ValueError, match="device, got both: the latter is 'cpu'"):
        workers_of(grid_of(device="cpu"), None, 1, "cpu", Launch())
    for jobs, devices, launch in ((2, None, Launch()), (1, "cpu", Launch()), (1, None, ON_ONE)):
        with pytest.raises(ValueError, match="leave it out"):
            workers_of(grid_of(), (), jobs, devices, launch)


def test_processes_meet_and_find_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "_SHOWING", 0.3)
    launch = Launch(count=2, meets=True)

    def said(rank, *arguments):
        try:
            meeting.meet(launch, *arguments)
            return None
        except (ValueError, RuntimeError) as error:
            return str(error)

    def work(rank):
        shared, other = tmp_path / "sweep", tmp_path / f"of{rank}"
        return said(rank, shared, "same"), said(rank, shared, str(rank)), said(rank, other, "same")

    def on_one(rank):
        return said(rank, tmp_path / "sweep", "same", "GPU-a"), said(rank, tmp_path / "sweep", "same", f"GPU-{rank}")

    def unshared(rank):
        # as two hosts have a folder each under one name
        monkeypatch.setattr(meeting.Path, "exists", lambda path: rank == 0)
        return said(rank, tmp_path / "sweep", "same")

    for fine, grids, folders in in_processes(2, work):
        assert fine is None
        assert "expected the same sweep file" in grids
        assert folders is None
    for one, each in in_processes(2, on_one):
        assert "processes 0 and 1 both have their model on GPU-a" in one and each is None
    first, second = in_processes(2, unshared)
    assert "expected an output folder that all of them share" in first
    assert "expected an output folder that all of them share" in second
    assert list((tmp_path / "sweep").iterdir()) == []


def test_processes_that_cannot_meet(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(OSError, match="process 0 cannot meet the 1 others: "):
            meeting.meet(Launch(0, 2, 0, 2, meets=True), tmp_path, "grid")
    assert list(tmp_path.iterdir()) == []
