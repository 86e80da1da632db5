"""The processes that torchrun has started for one sweep meet once, before any begins; afterwards each goes its way.

What would go wrong after hours, or silently, is found here: another grid, or a folder that some do not share.
"""

from __future__ import annotations

import datetime
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from lofit_fast.files import writable_folder
from lofit_fast.ranks import check_same, gathered, rank, together, told
from lofit_fast.training.shared_batches import check_devices
from lofit_fast.training.sweep.launched import Launch
from lofit_fast.training.sweep.worker_devices import CPU

# seconds that the others may take to come, and a shared file system to show a new file
_COMING, _SHOWING = 300, 20.0


def meet(launch: Launch, folder: Path, grid: str, chip: str = CPU) -> None:
    """Raise in every process what is wrong in one: another grid (a digest of it), or a folder that is not shared.

    chip: what this process computes on, see `chip_of`; two of one machine on one are refused too.
    Raises ValueError for either, `ElsewhereError` naming the process that failed, OSError where the processes cannot
    reach each other.
    """
    with _group(launch):
        check_same(grid, "sweep file, read with the same options,")
        check_devices([[place] for place in gathered((socket.gethostname(), chip))])
        made = told(lambda: _made(folder))
        try:
            with together("looking for the sweep's folder"):
                _see(Path(made), launch)
        finally:
            if rank() == 0:
                with suppress(OSError):
                    Path(made).unlink()


@contextmanager
def _group(launch: Launch) -> Iterator[None]:
    """A scope in which the processes can speak to each other; a group that is there already is used, and stays."""
    if dist.is_initialized():
        yield
        return
    try:
        dist.init_process_group(
            "gloo", rank=launch.number, world_size=launch.count, timeout=datetime.timedelta(seconds=_COMING)
        )
    # of torch: errors of the network, of its store, and of a time limit
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"process {launch.number} cannot meet the {launch.count - 1} others: {said}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _made(folder: Path) -> str:
    path = writable_folder(folder).resolve() / f".met-{uuid.uuid4().hex}"
    path.touch()
    return str(path)


def _see(made: Path, launch: Launch) -> None:
    until = time.monotonic() + _SHOWING
    while not made.exists():
        if time.monotonic() > until:
            raise ValueError(
                f"process {launch.number} on host {socket.gethostname()} does not see in {made.parent} what process 0 "
                "has written there: expected an output folder that all of them share"
            )
        time.sleep(0.1)
