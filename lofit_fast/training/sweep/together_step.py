"""One forward and one backward pass for many trainings: each has rows of its own in the batch, and an adapter on them.

A training sees a model that holds its own vectors and nothing else. It hands its batch over, and is given back its loss
with the gradients of its vectors: the optimizer, the clipping and the schedule are those of any training by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lofit_fast.data.collate import CompletionCollator, Logits, kept
from lofit_fast.data.encode import IGNORED, pad_token_id
from lofit_fast.patching.answer_positions import answers_of
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.storage import Adapter, check_heads, fill
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.engine import Engine
from lofit_fast.training.objectives import EncodedCompletions
from lofit_fast.training.sweep.together_turns import Ask
from lofit_fast.training.trainer import LofitTrainer, Rows

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class Wanted:
    """What a training asks for: its adapter's name, its collated batch, and by how many labels its loss is divided."""

    name: str
    batch: dict[str, Tensor]
    items: int | None


class JointStep:
    """Batches of several trainings -> (loss, gradients of its vectors) of each.

    handle: of the model, with an adapter for each training. pad: the id of padding. logits: what the model is asked
    for, see `CompletionCollator`.
    """

    def __init__(self, handle: LofitHandle, pad_id: int, logits: Logits) -> None:
        self.handle, self.pad_id, self.logits = handle, pad_id, logits

    def __call__(self, wanted: Sequence[Wanted]) -> list[tuple[Tensor, list[Tensor]]]:
        """In the order of what is wanted."""
        handle, model = self.handle, self.handle.model
        ids = self._joined(wanted, "input_ids", self.pad_id)
        labels = self._joined(wanted, "labels", IGNORED)
        following = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)), 1)
        asked = kept(following, self.logits)
        targets = asked.pop("shift_labels")
        counts = [len(one.batch["input_ids"]) for one in wanted]
        names = [one.name for one, count in zip(wanted, counts, strict=True) for _ in range(count)]
        acting = nullcontext() if handle.acting is None else handle.acting_on(answers_of(labels))
        with handle.rows(names), acting, torch.enable_grad():
            mask = self._joined(wanted, "attention_mask", 0)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **asked).logits
            each = cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
            losses = self._split(each, wanted, counts, labels)
            parameters = [list(handle.parameters(one.name)) for one in wanted]
            flat = [parameter for own in parameters for parameter in own]
            gradients = iter(torch.autograd.grad(sum(losses), flat))
        return [(loss.detach(), [next(gradients) for _ in own]) for loss, own in zip(losses, parameters, strict=True)]

    def _joined(self, wanted: Sequence[Wanted], name: str, filling: int) -> Tensor:
        """(rows of all, longest): what is missing of a batch's width is filled."""
        tensors = [one.batch[name] for one in wanted]
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([pad(tensor, (0, width - tensor.shape[1]), value=filling) for tensor in tensors])

    def _split(self, each: Tensor, wanted: Sequence[Wanted], counts: list[int], labels: Tensor) -> list[Tensor]:
        """The loss of each training, from those of tokens in the order of rows; what has no label has a loss of 0."""
        labelled = (labels[:, 1:] != IGNORED).split(counts)
        by_row = self.logits in ("columns", "all")
        width = each.numel() // len(labels)
        sizes = [width * len(own) if by_row else int(own.sum()) for own in labelled]
        sums = [part.sum() for part in each.split(sizes)]
        divided = [own.sum() if one.items is None else one.items for one, own in zip(wanted, labelled, strict=True)]
        return [total / by for total, by in zip(sums, divided, strict=True)]


class _Known(torch.autograd.Function):
    """A loss whose gradients have been found already."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        """The loss. gradients: of each parameter."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        """The gradients, as they are known."""
        return None, None, *(grad * gradient for gradient in ctx.gradients)


class MemberModel(nn.Module):
    """What one training takes for its model: the vectors of its adapter, and a forward that others share.

    model: the patched one, which is no part of it. ask: hands a `Wanted` over for (loss, gradients).
    """

    def __init__(self, model: nn.Module, name: str, vectors: Sequence[nn.Parameter], ask: Ask) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(vectors)
        self.config, self.name = model.config, name
        # in a tuple, lest it become a child
        self._shared = (model,)
        self._ask = ask

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **more) -> Any:
        """{"loss": a scalar} in training; in evaluation what the model gives, with the adapter that is active."""
        (model,) = self._shared
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if not (self.training and torch.is_grad_enabled()):
            with eval_mode(model):
                return model(**batch, **more, use_cache=False)
        loss, gradients = self._ask(Wanted(self.name, batch, num_items_in_batch))
        return {"loss": _Known.apply(loss, gradients, *self.vectors)}


class MemberHandle:
    """One adapter of several as a training sees it. handle: of all. model: what is trained, or what it is in."""

    def __init__(self, handle: LofitHandle, name: str, model: nn.Module) -> None:
        self.handle, self.name, self.model = handle, name, model
        self._vectors = {("offset", number): vectors for number, vectors in handle.other_vectors(name).items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""
        return iter(self._vectors.values())

    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def vectors(self) -> dict[tuple[str, int], nn.Parameter]:
        """The offsets (h, D), by ("offset", layer)."""
        return self._vectors

    def disabled(self) -> AbstractContextManager[None]:
        """As of the handle."""
        return self.handle.disabled()

    def save(self, folder: Path | str) -> Path:
        """Write the adapter folder."""
        return self.handle.save(folder, self.name)

    def take(self, adapter: Adapter) -> None:
        """Copy an adapter of the same heads. Raises ValueError for another."""
        check_heads(adapter, self.handle.other_adapter(self.name).config)
        fill(dict(self._vectors), adapter)


class MemberData:
    """A training's data, whose trainer takes steps with others. Everything else is `EncodedCompletions`'s own.

    model: what the trainer is given. logits: as of `JointStep`.
    """

    def __init__(self, data: EncodedCompletions, logits: Logits) -> None:
        self._data, self._logits = data, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def as_it_was(self) -> AbstractContextManager[None]:
        """Whoever shares the model looks after it."""
        return nullcontext()

    @contextmanager
    def trainer(
        self, attachment: MemberHandle, schedule: Schedule, engine: Engine, *, folder: Path, on_epoch: Callable, **how
    ) -> Iterator[Trainer]:
        """With batches that are padded."""
        data = self._data
        collator = CompletionCollator(pad_token_id(data.tokenizer), logits=self._logits)
        evaluation = Rows(data.judged_rows) if data.judged_rows else None
        yield LofitTrainer(
            attachment,
            l1=schedule.l1,
            group_by_length=engine.group_by_length,
            on_epoch=on_epoch,
            shown=data.shown,
            callbacks=list(how["callbacks"]),
            args=training_arguments(
                data.model,
                folder,
                schedule,
                progress=False,
                keep=how["keep"],
                eval_strategy="no" if evaluation is None else "epoch",
                prediction_loss_only=True,
            ),
            train_dataset=Rows(data.rows),
            eval_dataset=evaluation,
            data_collator=collator,
        )
