"""A row of a comparison: a peer, how it is run, and what is trained; and the same put into a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Attached
from benchmarks.peers.table import TIMED
from benchmarks.speed.step.row_settings import SETTINGS, STOCK, Setting
from benchmarks.speed.step.steps import vectors
from benchmarks.speed.step.workload import BATCH, Collate, Workload, grouped_batches, stock_batches
from lofit_fast.data.collate import Logits, on_device
from lofit_fast.data.encode import Encoded
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.training.engine import Engine, collator_of, prepared
from lofit_fast.training.engine.attention_choice import best_attention
from lofit_fast.training.engine.auto import typical_batch, with_packing

L1 = 5e-4
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Row:
    """One thing to time. setting: a key of SETTINGS. step: one of STEPS, or "" for peers that do not depend on it."""

    peer: str
    setting: str
    step: str = ""

    @property
    def how(self) -> Setting:
        """The setting itself."""
        return SETTINGS[self.setting]

    def __str__(self) -> str:
        return ", ".join(part for part in (self.peer, self.step, self.setting) if part)


@dataclass(frozen=True)
class Live:
    """A row whose peer sits in a model of its own.

    optimizer: of its parameters; None for the floor. engine: of the row's setting. collate: makes its batches, if not
    the engine's own collator.
    notes: what else was measured while it was put there, for the row's results. logits: how the engine's batches ask
    for those of labelled tokens, as our training finds it out.
    """

    row: Row
    attached: Attached
    optimizer: torch.optim.Optimizer | None
    engine: Engine
    collate: Collate | None = None
    notes: dict[str, float] = field(default_factory=dict)
    logits: Logits = "rows"

    def batches(self, rows: Sequence[Encoded], pad: int) -> list[dict[str, Tensor]]:
        """The examples as this row's setting batches them, on the model's device."""
        stock = self.row.how.stock
        collate = self.collate or collator_of(self.engine, pad, self.logits)
        made = stock_batches(rows, pad) if stock else grouped_batches(rows, collate)
        device = next(self.attached.model.parameters()).device
        return [on_device(batch, device) for batch in made]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's loss on a batch, with its graph."""
        model = self.attached.model
        with self.row.how.computing(next(model.parameters()).device):
            return model(**{**batch, "use_cache": False}).loss

    def step(self, batch: dict[str, Tensor]) -> float:
        """One training step, optimizer included; the floor ends with its backward pass. Returns the loss."""
        return self.update(batch).item()

    def update(self, batch: dict[str, Tensor]) -> Tensor:
        """The same, for whoever does not wait for the loss, a scalar on the model's device."""
        loss, parameters = self.loss(batch), self.attached.parameters
        penalty = 0.0 if self.attached.penalty is None else L1 * self.attached.penalty()
        (loss + penalty).backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return loss.detach()


def settled_engine(model: nn.Module, work: Workload, compiled: bool = True) -> Engine:
    """The engine that our own training chooses for this model on this machine where it compiles.

    For a run of the paper's length, some 200 steps: too few for the graph that a compiled narrow layer would need.
    compiled: False for the engine that it chooses where it does not.
    """
    weight = next(model.parameters())
    attention = best_attention(model, weight.device)
    engine = Engine(attention=attention, compile=compiled, narrow=not compiled, large_pages=compiled, prepack=False)
    return with_packing(model, engine, typical_batch(model, work.rows, work.pad, BATCH))


@contextmanager
def live(
    base: nn.Module, row: Row, engine: Engine, copied: Callable = copy.deepcopy, stock: Engine = STOCK
) -> Iterator[Live]:
    """A scope with the row's peer in a copy of the model, prepared as its setting says, in training mode.

    stock: the engine of rows that are run as their users run them, which the careful ones begin with.
    Raises Absent where the peer cannot be had here.
    """
    model = copied(base)
    attached = TIMED[row.peer].attach(model, vectors(base, row.step or "step 2"))
    # the optimizer a stock Trainer takes by default; ours takes the same
    optimizer = (
        torch.optim.AdamW(attached.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        if attached.trains
        else None
    )
    attached.model.train()
    chosen = row.how.engine(engine, stock)
    # how logits are asked for is the engine's, and with a mask the host would wait for the device
    scope = nullcontext() if row.how.stock else selecting_rows(attached.model)
    with prepared(attached.model, chosen), scope:
        logits = "rows" if row.how.stock else logit_rows(attached.model, SCOPED)
        yield Live(row, attached, optimizer, chosen, logits=logits)


def uncopied(model: nn.Module) -> nn.Module:
    """For `live` in a process that measures one row only: the model itself."""
    return model
