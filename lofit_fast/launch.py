"""Whether torchrun or accelerate has started this process as one of several, as their environment variables say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

# set for each process by torchrun, by accelerate launch, and by hand for torch's env:// meeting
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
# of accelerate: how a model is spread over the processes
_SPREADING = ("ACCELERATE_USE_", "FSDP_", "PARALLELISM_CONFIG_")


@dataclass(frozen=True)
class Launch:
    """One of several processes. rank: its number of `count`, from 0; local_rank: of the `local_count` on its machine.

    address, port: where they meet. kept: whether the launcher keeps the meeting place, and not the first process.
    attempt: how often the launcher has started all of them again.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    address: str
    port: int
    kept: bool
    attempt: str


def launched(variables: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher has set; None for a process that runs by itself.

    Raises ValueError for variables that are set in part, or are no numbers that fit together.
    """
    count = _number(variables, "WORLD_SIZE", 1)
    if count == 1:
        return None
    if missing := [name for name in _NEEDED if not variables.get(name)]:
        raise ValueError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: expected "
            "all of what torchrun and accelerate launch set, or no WORLD_SIZE for one process by itself"
        )
    rank = _number(variables, "RANK", 0)
    # by hand one process is often started on each machine
    local_rank, local_count = _number(variables, "LOCAL_RANK", 0), _number(variables, "LOCAL_WORLD_SIZE", 1)
    port = _number(variables, "MASTER_PORT", 0)
    limits = {"RANK": (rank, count - 1), "MASTER_PORT": (port, 2**16 - 1)}
    if variables.get("LOCAL_WORLD_SIZE"):
        limits |= {"LOCAL_WORLD_SIZE": (local_count, count), "LOCAL_RANK": (local_rank, local_count - 1)}
    for name, (value, most) in limits.items():
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value}: expected 0 to {most}, with WORLD_SIZE={count}")
    kept = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Launch(rank, count, local_rank, local_count, variables["MASTER_ADDR"], port, kept, attempt)


def local_count(variables: Mapping[str, str] = os.environ) -> int:
    """How many processes of the launch are on this machine; 1 for a process by itself."""
    launch = launched(variables)
    return 1 if launch is None else launch.local_count


@contextmanager
def by_itself() -> Iterator[None]:
    """A scope in which libraries that read the launcher's variables see a process that runs by itself."""
    names = [name for name in os.environ if name in VARIABLES or name.startswith(_SPREADING)]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def _number(variables: Mapping[str, str], name: str, otherwise: int) -> int:
    text = variables.get(name) or str(otherwise)
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}: expected a whole number, as torchrun sets it") from None
    if name == "WORLD_SIZE" and number < 1:
        raise ValueError(f"{name} is {text}: expected a whole number from 1")
    return number
