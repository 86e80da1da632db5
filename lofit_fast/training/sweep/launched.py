"""How a sweep's process was started, alone or as one of several, and the environment that a worker is started in.

What a sweep reads or sets of the environment beside `launchers` is here. Launchers tell a process its number in
variables. A worker must not see them: Trainer would take the runs of all workers for one run in several processes.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lofit_fast import launchers

# kind of device -> the variable that says which of them a process sees
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
# by which launchers tell a process that it is one of several: names, and beginnings of names
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME")
_NAMES += ("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BEGINNINGS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_BEGINNINGS += ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")


@dataclass(frozen=True)
class Launch:
    """One start of one or several processes, and which of them this is.

    number of count: among all. local of local_count: among those on this machine. job: what tells this start from
    others, "" where nothing does. meets: whether the others can be met in a process group.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
    job: str = ""
    member: str = ""
    meets: bool = False


def launched() -> Launch:
    """How this process was started, by torchrun's variables or SLURM's.

    Raises ValueError for variables that are no numbers of a process.
    """
    found = launchers.launched()
    if found is not None and launchers.meets():
        return _by_torchrun(found)
    return _by_slurm(os.environ) if "SLURM_JOB_ID" in os.environ else Launch()


def _by_torchrun(found: launchers.Launched) -> Launch:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # without an id of its own, a start is known by the process that starts the others
    run = f"{socket.gethostname()} {os.getppid()}" if run in ("", "none") else run
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    numbers = (found.rank, found.count, found.local, found.local_count)
    return Launch(*numbers, f"torchrun {run} {attempt}", str(found.rank), meets=found.count > 1)


def _by_slurm(environ: Mapping[str, str]) -> Launch:
    """One of srun's tasks, or of an array's jobs; in a batch script alone it is one process, of one job."""
    of_step = "SLURM_STEP_NUM_TASKS" in environ
    job = environ.get("SLURM_ARRAY_JOB_ID", environ["SLURM_JOB_ID"])
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    step = environ.get("SLURM_STEP_ID", "") if of_step else ""
    number = _number(environ, "SLURM_PROCID", 0) if of_step else 0
    return Launch(
        number,
        _number(environ, "SLURM_STEP_NUM_TASKS", 1) if of_step else 1,
        _number(environ, "SLURM_LOCALID", 0) if of_step else 0,
        _on_this_node(environ) if of_step else 1,
        f"slurm {job} {step} {restarts}",
        f"{environ.get('SLURM_ARRAY_TASK_ID', '')} {number}",
    )


def _on_this_node(environ: Mapping[str, str]) -> int:
    """Tasks on this node, of SLURM's "4(x2),1": four on each of the first two nodes, one on the third."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    each = [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
    node = _number(environ, "SLURM_NODEID", 0)
    return each[node] if node < len(each) else 1


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise ValueError(f"expected the variable {name} to be a whole number, got {text!r}")
    return int(text)


@contextmanager
def worker_environment(device: str | None) -> Iterator[None]:
    """A scope in which a worker is started: it sees no launcher and, of the machine's devices, only its own.

    device: "cuda:2" say, of those that this process sees, or "cpu"; None leaves the devices as they are.
    """
    before = dict(os.environ)
    for name in before:
        if name in _NAMES or name.startswith(_BEGINNINGS):
            del os.environ[name]
    os.environ.update(_visible(device, before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _visible(device: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a process sees one device alone; it is that process's first."""
    if device is None:
        return {}
    kind, _, index = device.partition(":")
    if kind not in VISIBLE:
        return {VISIBLE["cuda"]: ""}
    # the devices that this process sees may be others than the machine's first
    seen = environ.get(VISIBLE[kind], "").split(",") if environ.get(VISIBLE[kind]) else []
    return {VISIBLE[kind]: seen[int(index)].strip() if seen else index}
