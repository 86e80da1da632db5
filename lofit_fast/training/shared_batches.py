"""Data parallel: batches are those of one process, cut among all, and what is learned from them is put together.

Every process draws the same batches in the same order and takes its own rows of each. The gradients of a step are
summed over the processes in one message, some kilobytes, before they are clipped: the base is frozen, so nothing else
moves. torch's wrapper for data parallelism would send the base, and average over processes instead of over labels.

Where the processes hold one model together (tensor parallel) nothing is cut: each computes with whole batches, and has
whole gradients already.
"""

from __future__ import annotations

import socket
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lofit_fast import ranks
from lofit_fast.data.encode import IGNORED
from lofit_fast.launchers import sharding_asked
from lofit_fast.models.base_digest import dropout_of
from lofit_fast.models.device import name_of_chip
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.tensor_parallel import is_tensor_parallel
from lofit_fast.training.engine.device_queue import devices_of

# of a batch, under a name that no model takes
SHARE = "share_of_batch"


@dataclass(frozen=True)
class Share:
    """A process's share of a batch. rows, labels: how many the batch has. here_rows, here_labels: how many are its own.

    A process without a row of its own computes the first one for nothing, so that all run the same layers.
    """

    rows: int
    labels: int
    here_rows: int
    here_labels: int

    def own(self, value: Tensor) -> Tensor:
        """What was computed of the process's own rows; 0, with its graph, where it has none."""
        return value if self.here_rows else value * 0.0


def sharers(model: nn.Module) -> int:
    """How many processes share each batch of a model: all of the run, or one where they hold the model together."""
    return 1 if is_tensor_parallel(model) else ranks.count()


def check_shares(model: nn.Module, batch_size: int, accumulation_steps: int, n_examples: int) -> None:
    """Raise ValueError for what the processes of a run cannot share, before anything is changed."""
    n = sharers(model)
    if n < ranks.count() and (asked := sharding_asked()):
        raise ValueError(
            f"accelerate is configured for {asked}, but the model is tensor-parallel already, and each process trains "
            "with whole batches: start it with torchrun, or with a configuration without sharding"
        )
    if n == 1:
        return
    if batch_size % (n * accumulation_steps):
        micro = f" x {accumulation_steps} accumulation_steps" if accumulation_steps > 1 else ""
        raise ValueError(
            f"batch_size {batch_size} does not divide into {n} processes{micro}: the recipe's batch_size is that of "
            f"all processes together, expected a multiple of {n * accumulation_steps}"
        )
    if n_examples < n:
        raise ValueError(f"got {n_examples} examples for {n} processes, expected at least one for each")
    if asked := sharding_asked():
        raise ValueError(
            f"accelerate is configured for {asked}, but this training is data-parallel, each process with the whole "
            "model: start it with a configuration for several devices without sharding, or with torchrun"
        )
    if getattr(text_config(model), "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__} balances its experts over each batch (output_router_logits=True), and the part of "
            f"one of {n} processes is no such batch: set model.config.output_router_logits = False, or use one process"
        )


def check_places(model: nn.Module) -> None:
    """Raise ValueError in every process where two of them have their models on one accelerator. All must call it."""
    if ranks.count() > 1:
        host = socket.gethostname()
        check_devices(ranks.gathered([(host, name_of_chip(device)) for device in devices_of(model)]))


def check_devices(places: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Raise ValueError for processes that have their models on one accelerator. places: (host, device) by process."""
    taken: dict[tuple[str, str], int] = {}
    for number, own in enumerate(places):
        for host, device in own:
            other = taken.setdefault((host, device), number)
            if other != number and not device.startswith("cpu"):
                raise ValueError(
                    f"processes {other} and {number} both have their model on {device} of {host}, expected a device of "
                    "its own for each: load it on the device of the process's local number (LOCAL_RANK)"
                )


def own_rows(rows: Sequence) -> list:
    """The rows of a batch that are this process's: every n-th, so that all have long and short ones. May be empty."""
    return list(rows[ranks.rank() :: ranks.count()])


@dataclass(frozen=True)
class ShareCollator:
    """A collator of whole batches -> one of this process's rows, with a Share under SHARE.

    collate: makes a batch of rows. labels: how many labels a row has; None where nobody counts them. cut: whether
    batches are cut among the processes; all rows are this one's otherwise.
    """

    collate: Callable[[Sequence], Mapping]
    labels: Callable[[object], int] | None = None
    cut: bool = True

    def __call__(self, rows: Sequence) -> dict:
        """A batch of the process's own rows, or of the first row where it has none."""
        mine = own_rows(rows) if self.cut else list(rows)
        count = self.labels or (lambda row: 0)
        share = Share(len(rows), sum(map(count, rows)), len(mine), sum(map(count, mine)))
        return {**self.collate(mine or rows[:1]), SHARE: share}


def n_labels_of(row: Mapping) -> int:
    """How many tokens of an encoded example are predicted; nothing predicts its first."""
    return sum(label != IGNORED for label in row["labels"][1:])


@dataclass
class SharedSteps:
    """What the micro-batches of a training's steps give in this process, and what they give in all of them.

    model: the trained one. seed: of what is drawn at random within layers.
    """

    model: nn.Module
    seed: int
    share: Share | None = None
    _ahead: deque[Share] = field(default_factory=deque)
    _seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drops = any(dropout_of(module) for module in self.model.modules())

    def begin(self, batches: Sequence[dict]) -> int:
        """The batches of a step, whose shares are taken out of them; returns how many labels all of them have."""
        self._seen = []
        self._ahead = deque(batch.pop(SHARE) for batch in batches)
        return sum(share.labels for share in self._ahead)

    def next(self) -> Share:
        """The next batch is computed: its share."""
        self.share = self._ahead.popleft()
        return self.share

    def part_of_labels(self, loss: Tensor, counted: bool) -> Tensor:
        """What this process's loss is of the whole batch's. counted: whether it was divided by all labels already."""
        share = self.share
        return share.own(loss if counted else loss * (share.here_labels / max(1, share.labels)))

    def part_of_rows(self, loss: Tensor) -> Tensor:
        """What a mean over this process's rows is of the mean over all."""
        return loss * (self.share.here_rows / self.share.rows)

    @contextmanager
    def drawing(self, step: int) -> Iterator[None]:
        """A scope in which layers that drop at random draw for this process alone, the same when a run is resumed."""
        if not self.drops:
            yield
            return
        devices = [device for device in devices_of(self.model) if device.type == "cuda"]
        with torch.random.fork_rng(devices):
            torch.manual_seed(zlib.crc32(f"{self.seed} {step} {len(self._ahead)} {ranks.rank()}".encode()))
            yield

    def saw(self, loss: Tensor, total: Tensor, norm: Tensor) -> None:
        """A micro-batch is through: this process's part of its loss, that with penalties, its gradients' norm."""
        self._seen += [loss.detach(), total.detach(), norm.detach()]

    @property
    def ends(self) -> bool:
        """Whether that was the last one of the step."""
        return not self._ahead

    def exchanged(self, parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sum the gradients of a step over all processes, in place: (loss, total, norm) of each micro-batch, summed.

        A norm is no norm of the sum; it is finite where all are.
        """
        trained = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        parts = all_summed([*grads, *self._seen])
        for p, grad, part in zip(trained, grads, parts, strict=False):
            p.grad = grad.copy_(part)
        scalars = parts[len(grads) :]
        return list(zip(scalars[::3], scalars[1::3], scalars[2::3], strict=True))


def all_summed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sums of every process's tensors, sent as one row, in float32 at least, on the first one's device."""
    if ranks.count() == 1:
        return tensors
    kind = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    row = torch.cat([x.detach().reshape(-1).to(tensors[0].device, kind) for x in tensors])
    parts = ranks.summed(row).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


def whole_gradients(model: nn.Module) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """What makes gradients of a process's part of a batch those of all of it."""
    return all_summed if sharers(model) > 1 else list


def shared_steps(model: nn.Module, seed: int) -> SharedSteps | None:
    """Of a run whose processes share batches; None of any other."""
    return SharedSteps(model, seed) if sharers(model) > 1 else None
