"""What decides a step's last bits beside its engine: kept when the step begins, and what can be is gone on with."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
import transformers
from torch import nn

from lofit_fast import ranks
from lofit_fast.patching.placement import device_of
from lofit_kernels.answers import answers_file, device_name


def begun_with(model: nn.Module) -> dict[str, object]:
    """Plain data: the device and its kind, versions, on a CPU the threads, and which answers of autotune there are.

    Sums over many numbers are split between threads, so their last bits depend on how many there are. So do they on how
    many processes share a batch, which is kept where it is more than one.
    """
    device = device_of(model)
    on_cpu = device.type == "cpu"
    return {
        "device": f"CPU, {torch.backends.cpu.get_cpu_capability()}" if on_cpu else device_name(device),
        **({"threads": torch.get_num_threads()} if on_cpu else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "autotune": _answers(device),
        **({"processes": ranks.count()} if ranks.count() > 1 else {}),
    }


@contextmanager
def as_begun(kept: Mapping[str, object], model: nn.Module, stage: str) -> Iterator[None]:
    """A scope with as many threads as a step was begun with. What else differs by now is said, in a line of stderr.

    kept: of `begun_with`; empty where an earlier release has kept nothing.
    """
    now, threads = {"processes": 1, **begun_with(model)}, torch.get_num_threads()
    # what an earlier release began with is not known
    kept = {"processes": 1, **kept} if kept else kept
    other = [f"{name} {kept[name]}, now {now.get(name)}" for name in kept if kept[name] != now.get(name)]
    wanted = kept.get("threads")
    taken = isinstance(wanted, int) and "threads" in now and wanted > 0
    if other and ranks.first():
        same = " (taken again)" if taken and other == [f"threads {wanted}, now {threads}"] else ""
        note = "" if same else ": its last bits may be others than those of a run in one go"
        print(f"the step {stage!r} was begun with {'; '.join(other)}{same}{note}", file=sys.stderr)
    if not taken:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _answers(device: torch.device) -> str | None:
    """A digest of what autotune has found on the device; None where nobody has asked it."""
    # without a home folder there are none
    with suppress(OSError, RuntimeError):
        return hashlib.sha256(answers_file(device_name(device)).read_bytes()).hexdigest()[:12]
    return None
