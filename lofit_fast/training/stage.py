"""One training of one attachment: a stage of LoFiT, or all that a peer needs. Every method goes through here."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback

from lofit_fast import ranks
from lofit_fast.data.encode import Encoded, pad_token_id
from lofit_fast.files import lasting_path
from lofit_fast.patching.fully_sharded import fully_sharded
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.storage import read_adapter
from lofit_fast.patching.tensor_parallel import is_tensor_parallel
from lofit_fast.random_states import same_random_numbers
from lofit_fast.torch_defaults import with_gradients
from lofit_fast.training.arguments import Schedule, accelerate_as_it_was
from lofit_fast.training.closed_callbacks import closed
from lofit_fast.training.cost import peak_memory, rates
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.auto import said, settle
from lofit_fast.training.engine.device_queue import current, devices_of
from lofit_fast.training.given_arguments import given_callbacks
from lofit_fast.training.objectives import EncodedObjective, Objective
from lofit_fast.training.prefix_cache.worth import settled_prefix
from lofit_fast.training.sharded_base import check_together, taken_for_whole, without_shortcuts
from lofit_fast.training.shared_batches import check_places, check_shares
from lofit_fast.training.stage_checkpoints import Checkpoint
from lofit_fast.training.verify_steps import StepCheck


@with_gradients
@same_random_numbers()
def train_attachment(
    attachment: Attachment,
    tokenizer,
    objective: Objective,
    schedule: Schedule,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> dict[str, object]:
    """Train what an attachment has to train, whatever method it is: one loss, schedule and engine for all.

    Args:
        attachment: in its model.
        tokenizer: of the model.
        objective: `Completions` or `Preferences`.
        schedule: rates, epochs and batches.
        output_dir: where the trainer may write; nothing is kept there.
        engine: how steps are run; None means the defaults.
        callbacks: a list of transformers' TrainerCallback.
        progress: whether bars and the engine's choice are shown.

    Returns:
        {"seconds", "loss": [mean of each epoch, without the L1 term], "tokens_per_s", "examples_per_s",
        "peak_memory_bytes"}. What comes before the steps (references, the prefix cache) is part of the seconds.

    Raises:
        TypeError: what is no list of callbacks, or no name of a folder.
        ValueError: nothing to train, no epochs, data that cannot be learned from, a knob the objective cannot use.
        ImportError: preferences without TRL.
        FloatingPointError: training diverges; the attachment is still in the model.
    """
    callbacks = given_callbacks(callbacks)
    output_dir = lasting_path(output_dir)
    with ranks.joined("training"):
        how = {"output_dir": output_dir, "engine": engine, "callbacks": callbacks}
        return _trained(attachment, tokenizer, objective, schedule, progress=progress and ranks.first(), **how)


def _trained(attachment, tokenizer, objective, schedule, *, output_dir, engine, callbacks, progress) -> dict:
    if not schedule.epochs:
        raise ValueError("expected at least one epoch to train, got 0")
    asked_gb = 0.0 if engine is None else engine.prefix_cache_gb
    if asked_gb not in (0, "auto") and not isinstance(attachment, LofitHandle):
        raise ValueError(
            f"prefix_cache_gb={asked_gb} was asked for, but only LoFiT's layers are known to leave those "
            f"below them alone: expected 0 for a {type(attachment).__name__}"
        )
    if is_tensor_parallel(attachment.model):
        check_together(attachment)
    data = objective.encoded(attachment.model, tokenizer, schedule.max_length, progress)
    check_places(attachment.model)
    check_shares(attachment.model, schedule.batch_size, schedule.accumulation_steps, data.n_examples)
    asked = data.usable(engine or Engine(), schedule.accumulation_steps)
    settled, said = settle_for(attachment, asked, data, tokenizer, schedule)
    if progress:
        print(said, file=sys.stderr)
    rows: list[dict] = []
    where = {"folder": output_dir, "callbacks": callbacks, "progress": progress}
    before, peak = train(attachment, data, schedule, settled, on_epoch=rows.append, **where)
    return {"loss": [row["loss"] for row in rows], **cost_of(rows, data, schedule, before), "peak_memory_bytes": peak}


def settle_for(
    attachment: Attachment,
    engine: Engine,
    data: EncodedObjective,
    tokenizer,
    schedule: Schedule,
    rows: Sequence[Encoded] | None = None,
) -> tuple[Engine, str]:
    """`auto.settle` for a schedule over an objective's data, with the prefix cache that pays there.

    rows: what an epoch goes through, where that is not all of it.
    """
    engine = without_shortcuts(attachment.model, engine)
    if fully_sharded(attachment.model):
        # one process alone cannot try anything
        return engine, said(engine)
    if engine.prefix_cache_gb == "auto":
        asked = engine
        engine = ranks.told(lambda: settled_prefix(attachment, asked, *data.reads(schedule)))
    rows = data.rows if rows is None else rows

    def tried() -> tuple[Engine, str]:
        return settle(attachment, engine, rows, pad_token_id(tokenizer), schedule.batch_size, schedule.epochs)

    if not is_tensor_parallel(attachment.model):
        # tried on one machine, and used on all
        return ranks.told(tried)
    # no process can try anything by itself
    found = tried()
    ranks.check_same(asdict(found[0]), "engine")
    return found


def train(
    attachment: Attachment,
    data: EncodedObjective,
    schedule: Schedule,
    engine: Engine,
    *,
    folder: Path,
    on_epoch: Callable[[dict], None],
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    keep: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[float, int | None]:
    """The training itself: (seconds before its first step, peak bytes above what was held before).

    Args:
        attachment, data, schedule: what is trained, on what, and how.
        engine: a settled one.
        folder: where the trainer writes.
        on_epoch: called with a dict after every epoch, see `AttachmentTraining`, with rates in real tokens.
        callbacks: of transformers' Trainer.
        progress: whether bars are shown.
        keep: whether checkpoints are left in the folder.
        checkpoint: a whole one to go on from, with the schedule's learning rate.

    Raises:
        ValueError: an attachment without parameters in its model.
        FloatingPointError: training diverges; `finite_steps.Diverged` says where.
        OSError: a checkpoint cannot be written.
    """
    model = attachment.model
    trained = {id(parameter) for parameter in attachment.parameters()}
    # an optimizer that a trainer makes sees the model's parameters alone
    if not trained or not trained <= {id(parameter) for parameter in model.parameters()}:
        raise ValueError(f"expected an attachment with parameters in its model, got a {type(attachment).__name__}")

    def report(row: dict) -> None:
        on_epoch(row | rates(*_done([row], data, schedule), row["seconds"]))

    started = time.perf_counter()
    how = {"folder": folder, "on_epoch": report, "callbacks": callbacks, "progress": progress, "keep": keep}
    with (
        accelerate_as_it_was(),
        taken_for_whole(model),
        current(device_of(model)),
        data.as_it_was(),
        prepared(model, engine),
        peak_memory(*devices_of(model)) as memory,
        data.trainer(attachment, schedule, engine, **how) as trainer,
    ):
        before = time.perf_counter() - started
        if checkpoint is not None and checkpoint.over:
            # something has ended it early, and a trainer would go on
            attachment.take(read_adapter(checkpoint.path))
        else:
            trainer.rate = schedule.lr
            with closed(trainer.callback_handler.callbacks), _verified(trainer, attachment, engine):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
    peaks = [peak for peak in ranks.gathered(memory.peak_bytes) if peak is not None]
    return before, max(peaks, default=None)


@contextmanager
def _verified(trainer, attachment: Attachment, engine: Engine) -> Iterator[None]:
    """A scope in which a trainer looks at its steps, where the engine says so. Raises ValueError for a peer."""
    if not engine.verify:
        yield
        return
    if not isinstance(attachment, LofitHandle):
        raise ValueError(f"verify=True looks at LoFiT's own layers: expected False for a {type(attachment).__name__}")
    said = f"process {ranks.rank()}: " if ranks.count() > 1 else ""
    trainer.verify = StepCheck(attachment, lambda line: print(f"{said}{line}", file=sys.stderr))
    try:
        yield
    finally:
        trainer.verify.close()


def cost_of(rows: Sequence[dict], data: EncodedObjective, schedule: Schedule, before: float) -> dict[str, float]:
    """seconds, tokens_per_s and examples_per_s of epochs, an interrupted run's too. before: seconds ahead of them."""
    seconds = before + sum(row["seconds"] for row in rows)
    return {"seconds": seconds, **rates(*_done(rows, data, schedule), seconds)}


def _done(rows: Sequence[dict], data: EncodedObjective, schedule: Schedule) -> tuple[float, float]:
    """Examples and tokens of epochs, the last of which may have been cut short."""
    steps = math.ceil(data.n_examples / schedule.batch_size)
    shares = [(len(row["step_losses"]) / steps, row["epoch"] - 1) for row in rows]
    return sum(share for share, _ in shares) * data.n_examples, sum(share * data.tokens(at) for share, at in shares)
