"""How a process learns which of several it is, and meets the others: what a launcher says in the environment.

All that is read of torchrun's and accelerate's variables is read here.
"""

from __future__ import annotations

import atexit
import datetime
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

# minutes that one process waits for the others at the most
TIMEOUT = "LOFIT_FAST_TIMEOUT_MINUTES"
_MINUTES = 30.0
# seconds until it says that it waits
_QUIET = 15.0
# torchrun's name first, then those of mpirun, through which accelerate starts processes on CPUs
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
# srun's, for scripts that give its tasks torchrun's other variables
_LOCAL += ("SLURM_LOCALID",)
_LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
# what accelerate is told to do with the model, in whatever trainer
_FSDP = "ACCELERATE_USE_FSDP"
_SHARDING = {
    _FSDP: "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


@dataclass(frozen=True)
class Meeting:
    """Where the processes meet. kept: whether the launcher keeps the place, and not the first process.

    attempt: how often the launcher has started all of them again.
    """

    address: str
    port: int
    kept: bool
    attempt: str


@dataclass(frozen=True)
class Launched:
    """What a launcher has said. rank, count: of all processes. local, local_count: of those on this machine."""

    rank: int
    count: int
    local: int
    local_count: int


def launched() -> Launched | None:
    """What the environment says; None where no launcher has started this process with others.

    Raises ValueError for what are no numbers of a process, and for several processes of which this has no number.
    """
    count, number = _read(_COUNT), _read(_RANK)
    if count is not None and count > 1 and number is None:
        raise ValueError(
            f"the environment says that this is one of {count} processes (WORLD_SIZE), but not which (RANK): start "
            "them with torchrun or accelerate launch, or unset WORLD_SIZE for one process by itself"
        )
    if count is None or number is None:
        return None
    local, local_count = _read(_LOCAL), _read(_LOCAL_COUNT)
    if not 0 <= number < count:
        raise ValueError(f"the environment says that this is process {number} of {count}: expected 0 to {count - 1}")
    return Launched(number, count, number if local is None else local, count if local_count is None else local_count)


def limit() -> datetime.timedelta:
    """How long a process waits for another. Raises ValueError where the variable is no number of minutes."""
    said = os.environ.get(TIMEOUT)
    if not said:
        return datetime.timedelta(minutes=_MINUTES)
    try:
        minutes = float(said)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= 1e6:
        raise ValueError(f"{TIMEOUT} is {said!r}, expected minutes above 0")
    return datetime.timedelta(minutes=minutes)


@contextmanager
def said_in_time(what: str) -> Iterator[None]:
    """A scope that says on stderr what it does if it takes long, as it does where no launcher has started others."""
    minutes = limit().total_seconds() / 60
    said = f"{what}, {minutes:g} minutes at the most ({TIMEOUT}). One process by itself has neither RANK nor WORLD_SIZE"
    timer = threading.Timer(_QUIET, lambda: print(said, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def meets() -> bool:
    """Whether the environment says where the processes meet."""
    return not _absent()


def _absent() -> list[str]:
    return [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]


def meeting(found: Launched) -> Meeting:
    """Where the processes of a launch meet. Raises ValueError where the environment does not say it."""
    if absent := _absent():
        raise ValueError(
            f"this is process {found.rank} of {found.count}, but {' and '.join(absent)} do not say where they meet: "
            "start them with torchrun or accelerate launch"
        )
    port = _read(("MASTER_PORT",))
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT is {port}, expected a port's number")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Meeting(os.environ["MASTER_ADDR"], port, kept, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join(found: Launched) -> None:
    """Make the group of a launcher's processes. Raises OSError where they cannot meet, ValueError for a bad address."""
    import torch
    import torch.distributed as dist

    place = meeting(found)
    where = f"{place.address}:{place.port}"
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local % torch.cuda.device_count())
        # tensors that are on no GPU are sent by the host
        backend = "cpu:gloo,cuda:nccl"
    options = {"rank": found.rank, "world_size": found.count, "timeout": limit()}
    try:
        with said_in_time(f"process {found.rank} of {found.count} waits at {where} for the others to join"):
            dist.init_process_group(backend, **options)
    except (RuntimeError, OSError) as error:
        raise OSError(_unmet(found, where, " ".join(str(error).split()))) from error
    # a process that ends with the group still there prints a warning
    atexit.register(_left)


def sharding_asked() -> str | None:
    """What accelerate's configuration asks to be done with the model, in words; None where it is left whole."""
    return next((what for name, what in _SHARDING.items() if _is_on(name)), None)


def fsdp_asked() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return _is_on(_FSDP)


def precision_asked() -> str | None:
    """The mixed precision that accelerate's configuration asks for, "bf16" say; None for none."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return None if asked == "no" else asked


def unlaunched() -> AbstractContextManager[None]:
    """A scope in which the environment says nothing of other processes, for a library that would act on it."""
    return _unsaid(*_RANK, *_COUNT, *_LOCAL, *_LOCAL_COUNT)


def without_fsdp() -> AbstractContextManager[None]:
    """A scope in which the environment says nothing of FSDP, for a trainer that would shard the model itself."""
    return _unsaid(_FSDP)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


@contextmanager
def _unsaid(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _read(names: tuple[str, ...]) -> int | None:
    said = next(((name, os.environ[name]) for name in names if os.environ.get(name)), None)
    if said is None:
        return None
    try:
        return int(said[1])
    except ValueError:
        raise ValueError(f"{said[0]} is {said[1]!r}, expected the number that a launcher gives it") from None


def _unmet(found: Launched, where: str, said: str) -> str:
    this = f"process {found.rank} of {found.count}"
    if "EADDRINUSE" in said or "in use" in said:
        return f"{this} cannot meet the others at {where}: the port is in use; choose another (--master-port): {said}"
    minutes = limit().total_seconds() / 60
    return (
        f"{this} has not met the others at {where} within {minutes:g} minutes ({TIMEOUT}): are all {found.count} "
        f"started, and can they reach that address? {said}"
    )


def _left() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
