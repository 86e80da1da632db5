"""What a training learns from: completions, or preferences. Everything that differs between the two is here.

An objective holds the data. Its `encoded` checks the data and turns it into one model's tokens, with which
`stage.train` and the two-step driver `fit.fit_objective` work.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lofit_fast.config import Recipe, shown
from lofit_fast.data.collate import Logits
from lofit_fast.data.encode import (
    Encoded,
    as_example,
    encode_all,
    encode_prompt,
    pad_token_id,
)
from lofit_fast.data.given_examples import at_rest, given_examples
from lofit_fast.evaluation.choices import check_room
from lofit_fast.evaluation.judge import answer_length, exact_match_accuracy, judged_by
from lofit_fast.models.head_trial import chunked_losses, longest_head
from lofit_fast.models.label_counts import divides_by_count
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.next_tokens import check_next_tokens
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.models.vocabulary import check_ids, check_padding
from lofit_fast.patching.architectures import text_config
from lofit_fast.tasks.task import Example, Preference, Task
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.encoded_preferences import EncodedPreferences
from lofit_fast.training.engine import Engine, collator_of
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.finite_steps import SHOWN
from lofit_fast.training.first_epoch import first_epoch, looked_at, loss_sum
from lofit_fast.training.model_limits import check_language_model, token_limit
from lofit_fast.training.prefix_cache.cache import prefix_cached
from lofit_fast.training.prompt_store import prompts_kept
from lofit_fast.training.run_digests import data_digest
from lofit_fast.training.trainer import LofitTrainer, Rows, undisturbed

Examples = Sequence[Example | Mapping]
# of DPO's loss, the paper's
BETA = 0.5


class Objective(Protocol):
    """What is learned. name: in sentences and in the run folder."""

    name: str

    def encoded(self, model: nn.Module, tokenizer, max_length: int | None, progress: bool = False) -> EncodedObjective:
        """The data as this model's tokens. Raises ValueError for data that cannot be learned from.

        progress: whether a bar shows tokenizing that takes more than a second.
        """


class EncodedObjective(Protocol):
    """An objective's data as one model's tokens.

    rows: the sequences of an epoch, by which the engine is chosen. n_examples: how many examples an epoch has.
    least_epochs: the fewest that a step can be trained for. chance: the loss of a guess, or None.
    """

    rows: list[Encoded]
    n_examples: int
    least_epochs: int
    chance: float | None

    def identity(self) -> dict[str, object]:
        """Plain data by which two runs on the same data are known."""

    def identity_before(self) -> dict[str, object]:
        """The entries of `identity` that earlier releases had otherwise, as they had them."""

    def usable(self, engine: Engine, accumulation_steps: int) -> Engine:
        """The engine without what this objective has no use for. Raises ValueError where that was asked for."""

    def tokens(self, epoch: int) -> int:
        """Real tokens of an epoch, counted from 0."""

    def reads(self, schedule: Schedule) -> tuple[list[Encoded], int]:
        """(every sequence that a training passes through the model, evaluation's too; tokens of all its passes)."""

    def as_it_was(self) -> object:
        """A scope after which the model is as it was but for the attachment's parameters."""

    def trainer(self, attachment: Attachment, schedule: Schedule, engine: Engine, **how) -> object:
        """A scope with the Trainer that trains the attachment; entering it does the work that comes before steps.

        how: folder, on_epoch, callbacks, progress, keep.
        """

    def metrics(self, batch_size: int, progress: bool) -> dict[str, float]:
        """How the model does now, on what was given to judge by; empty where there is nothing."""

    def looked_at(self, recipe: Recipe) -> list[Encoded]:
        """The rows that `losses` goes through: of `recipe.select_examples` examples, drawn by the seed."""

    def losses(
        self, attachment: Attachment, recipe: Recipe, engine: Engine, progress: bool
    ) -> Generator[Tensor, None, None]:
        """The losses of a first epoch over `looked_at`, with their graphs, in the order of training.

        One for each micro-batch: those of an optimizer step, `recipe.accumulation_steps` of them but for the last, add
        up to the step's loss. attachment: whose gradients are looked at. engine: a usable one, in whose `prepared`
        scope the model is. Of several processes in a run each has its own part of every loss; their sum is the loss.
        """


def objective_of(task: Task) -> Objective:
    """Preferences where the task has any, completions otherwise, judged by the task's validation examples."""
    return Preferences(task.preferences) if task.preferences else Completions(task.train, task.validation)


@dataclass(frozen=True)
class Completions:
    """Cross-entropy on the completion of each prompt.

    train, evaluation: tasks' Examples, or mappings with "prompt" and "completion", or with "messages", in a list, a
    data set of the `datasets` library or a frame (see `given_examples`). evaluation gives a loss per epoch and the
    exact match at the end; it may be empty.
    """

    train: Examples
    evaluation: Examples = ()

    name = "completions"

    def __post_init__(self) -> None:
        # a dry run goes through them before a training does, and both steps of several runs may
        object.__setattr__(self, "train", at_rest(self.train))
        object.__setattr__(self, "evaluation", at_rest(self.evaluation))

    def encoded(
        self, model: nn.Module, tokenizer, max_length: int | None, progress: bool = False
    ) -> EncodedCompletions:
        """Raises ValueError for no examples, one without labels, or one that does not fit max_length or the context,
        and for a model that is no decoder, or whose loss is not of next tokens."""
        return EncodedCompletions(model, tokenizer, self.train, self.evaluation, max_length, progress)


class EncodedCompletions:
    """See `EncodedObjective`."""

    least_epochs = 0

    def __init__(
        self, model: nn.Module, tokenizer, train: Examples, evaluation: Examples, max_length, progress: bool = False
    ) -> None:
        check_language_model(model)
        check_next_tokens(model)
        self.model, self.tokenizer, limit = model, tokenizer, token_limit(model, max_length)
        self.rows = encode_all(tokenizer, given_examples(train), limit, progress=progress)
        if not self.rows:
            raise ValueError("the training data is empty: expected at least one example")
        self.n_examples = len(self.rows)
        # every token as likely as any other
        vocabulary = getattr(text_config(model), "vocab_size", None)
        self.chance = math.log(vocabulary) if vocabulary else None
        held_out = given_examples(evaluation, "the evaluation data")
        self.judged = [as_example(example, tokenizer) for example in held_out]
        self.judged_rows = encode_all(tokenizer, self.judged, limit, progress=progress)
        self.answer_length = answer_length(tokenizer, self.judged)
        prompts = [encode_prompt(tokenizer, e.prompt) for e in self.judged]
        check_room(model, prompts, self.answer_length)
        check_ids(model, (row["input_ids"] for row in self.rows))
        check_ids(model, (row["input_ids"] for row in self.judged_rows), "evaluation example")
        check_ids(model, prompts, "prompt of evaluation example")
        check_padding(model, pad_token_id(tokenizer), self.rows + self.judged_rows)

    def identity(self) -> dict[str, object]:
        """Digests of the examples; of those held out with all that their metrics read."""
        return {"data": data_digest(self.rows), "eval_data": data_digest(self.judged_rows, map(judged_by, self.judged))}

    def identity_before(self) -> dict[str, object]:
        """Earlier releases knew the held-out examples' tokens alone, which say nothing of other accepted answers."""
        return {"eval_data": data_digest(self.judged_rows)}

    def usable(self, engine: Engine, accumulation_steps: int) -> Engine:
        """All of it."""
        return engine

    def tokens(self, epoch: int) -> int:
        """Of all examples."""
        return _tokens_of(self.rows)

    def reads(self, schedule: Schedule) -> tuple[list[Encoded], int]:
        """Each example once per epoch, and each held-out one after it."""
        sequences = self.rows + self.judged_rows
        return sequences, schedule.epochs * _tokens_of(sequences)

    def as_it_was(self):
        """Modes and the config's cache."""
        return undisturbed(self.model)

    @contextmanager
    def trainer(
        self,
        attachment: Attachment,
        schedule: Schedule,
        engine: Engine,
        *,
        folder: Path,
        on_epoch: Callable[[dict], None],
        callbacks: Sequence[TrainerCallback],
        progress: bool,
        keep: bool,
    ) -> Iterator[Trainer]:
        """The prefix cache, or that of prompts, is filled first."""
        # both are tried before anything hangs on the head
        logits, largest = logit_rows(self.model, SCOPED), max(schedule.batch_size, schedule.eval_batch_size)
        head = longest_head(self.model, self.rows + self.judged_rows, largest)
        divides = schedule.accumulation_steps == 1 or divides_by_count(self.model)
        with (
            selecting_rows(self.model),
            chunked_losses(self.model, head),
            self._batches(attachment, engine, logits, progress) as collator,
        ):
            yield LofitTrainer(
                attachment,
                l1=schedule.l1,
                group_by_length=engine.group_by_length,
                on_epoch=on_epoch,
                shown=self.shown,
                divides=divides,
                callbacks=list(callbacks),
                args=training_arguments(
                    self.model,
                    folder,
                    schedule,
                    progress=progress,
                    keep=keep,
                    eval_strategy="epoch" if self.judged_rows else "no",
                    prediction_loss_only=True,
                ),
                train_dataset=Rows(self.rows),
                eval_dataset=Rows(self.judged_rows) if self.judged_rows else None,
                data_collator=collator,
            )

    def shown(self, number: int) -> str:
        """How a training example begins."""
        return self.tokenizer.decode(self.rows[number]["input_ids"][:SHOWN], skip_special_tokens=True)[:SHOWN]

    @contextmanager
    def _batches(self, attachment: Attachment, engine: Engine, logits: Logits, progress: bool) -> Iterator[Callable]:
        """The collator to train with, in a scope in which the model takes its batches."""
        collator = collator_of(engine, pad_token_id(self.tokenizer), logits)
        with ExitStack() as scopes:
            answers = scopes.enter_context(self._prompts(attachment, engine, collator, logits, progress))
            if answers is collator:
                cache = {"gb": engine.prefix_cache_gb, "progress": progress}
                seen = self.rows + self.judged_rows
                answers = scopes.enter_context(prefix_cached(attachment, seen, collator, **cache))
            yield answers

    def _prompts(self, attachment: Attachment, engine: Engine, collator: Callable, logits: Logits, progress: bool):
        """`prompts_kept` of all examples, whichever of them a look takes: both steps share one store."""
        how = {"pad_token_id": pad_token_id(self.tokenizer), "logits": logits, "gb": engine.prompt_cache_gb}
        return prompts_kept(attachment, self.rows + self.judged_rows, collator, progress=progress, **how)

    def metrics(self, batch_size: int, progress: bool) -> dict[str, float]:
        """Exact match of greedy answers."""
        if not self.judged:
            return {}
        options = {"max_new_tokens": self.answer_length, "batch_size": batch_size, "progress": progress}
        return {"exact_match": exact_match_accuracy(self.model, self.tokenizer, self.judged, **options)}

    def looked_at(self, recipe: Recipe) -> list[Encoded]:
        """Of all examples, or of those drawn."""
        return [self.rows[i] for i in looked_at(self.n_examples, recipe)]

    def losses(
        self, attachment: Attachment, recipe: Recipe, engine: Engine, progress: bool
    ) -> Generator[Tensor, None, None]:
        """What each micro-batch adds to the mean cross-entropy of its step; over kept prompts as in training."""
        rows, logits = self.looked_at(recipe), logit_rows(self.model, SCOPED)
        collator = collator_of(engine, pad_token_id(self.tokenizer), logits)
        with selecting_rows(self.model), self._prompts(attachment, engine, collator, logits, progress) as collate:
            batches = first_epoch(self.model, self.tokenizer, rows, recipe, engine, progress, collate=collate)
            for batch, share in batches:
                yield share.own(loss_sum(self.model, batch)) / share.labels


@dataclass(frozen=True)
class Preferences:
    """DPO (arXiv:2305.18290), through TRL: a chosen answer against one of several rejected ones, drawn per epoch.

        -log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), mean over a batch

    The reference is the model with the attachment disabled, computed once: no second model is loaded.
    preferences: Preferences, or mappings with the texts "prompt" and "chosen" and one or more as "rejected", in what
    `given_examples` takes.
    """

    preferences: Sequence[Preference | Mapping[str, object]]
    beta: float = BETA

    name = "preferences"

    def __post_init__(self) -> None:
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not number or not 0 < self.beta <= sys.float_info.max:
            raise ValueError(f"expected a finite beta > 0, got {shown(self.beta)}")
        # 1 and 1.0 are the same run
        object.__setattr__(self, "beta", float(self.beta))
        object.__setattr__(self, "preferences", at_rest(self.preferences))

    def encoded(
        self, model: nn.Module, tokenizer, max_length: int | None, progress: bool = False
    ) -> EncodedPreferences:
        """Raises ImportError without TRL, ValueError for no preferences or an answer that is too long."""
        return EncodedPreferences(model, tokenizer, self.preferences, self.beta, max_length, progress)


def _tokens_of(rows: Iterable[Encoded]) -> int:
    return sum(len(row["input_ids"]) for row in rows)
