"""Preferences as one model's tokens: what DPO trains on, its references, and its trainer from TRL."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lofit_fast.config import Recipe
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import (
    BoundaryWarning,
    Encoded,
    check_unlike,
    encode_answers,
    pad_token_id,
)
from lofit_fast.data.given_examples import given_examples
from lofit_fast.evaluation.logprobs import RENDERED, reference_logprobs
from lofit_fast.extras import needing
from lofit_fast.models.head_trial import longest_head
from lofit_fast.models.logit_rows import logit_rows
from lofit_fast.models.next_tokens import check_next_tokens
from lofit_fast.models.vocabulary import check_ids, check_padding
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.placement import device_of
from lofit_fast.tasks.chat import Rendered
from lofit_fast.tasks.contrast import contrasts
from lofit_fast.tasks.preference_rows import as_preference
from lofit_fast.tasks.task import Preference, Task
from lofit_fast.training.arguments import Schedule, training_arguments
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.finite_steps import SHOWN
from lofit_fast.training.first_epoch import first_epoch, looked_at, loss_sum
from lofit_fast.training.model_limits import check_language_model, token_limit
from lofit_fast.training.prefix_cache.cache import PrefixCollator, prefix_cached
from lofit_fast.training.run_digests import data_digest, groups_digest
from lofit_fast.training.trainer import undisturbed


class EncodedPreferences:
    """See `EncodedObjective`."""

    least_epochs = 1
    # neither answer the likelier
    chance = math.log(2)
    # knobs of the engine that DPO has no use for, and what stands for "not used"
    UNUSED = {"packing": False, "narrow": False, "prompt_cache_gb": 0.0, "verify": False}

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        preferences: Sequence[Preference | Mapping[str, object]],
        beta: float,
        max_length,
        progress: bool = False,
    ) -> None:
        check_language_model(model)
        # DPO's log-probabilities are shifted here
        check_next_tokens(model, own_loss=False)
        _preference_trainer()
        preferences = preferences_of(preferences)
        if not preferences:
            raise ValueError("the training data is empty: expected at least one preference, got none")
        self.model, self.tokenizer, self.preferences, self.beta = model, tokenizer, preferences, beta
        self.limit = token_limit(model, max_length)
        questions = [(p.prompt, (p.chosen, *p.rejected)) for p in preferences]
        answers = encode_answers(tokenizer, questions, self.limit, progress=progress)
        for number, (chosen, *rejected) in enumerate(answers, start=1):
            for wrong in rejected:
                check_unlike(chosen["input_ids"], wrong["input_ids"], f"preference {number}: chosen and rejected")
        for number, rows in enumerate(answers, start=1):
            check_ids(model, (row["input_ids"] for row in rows), f"preference {number}, answer")
        check_padding(model, pad_token_id(tokenizer), answers)
        self._digest = groups_digest(answers)
        self._before = data_digest(row for rows in answers for row in rows)
        # what an epoch reads: of every preference the chosen answer and one rejected
        self.rows = [row for rows in answers for row in rows[:2]]
        self.answers = answers
        self.n_examples = len(preferences)
        self._tokens: list[int] = []

    def identity(self) -> dict[str, object]:
        """Digest of all answers, each with its question's, and beta."""
        return {"data": self._digest, "beta": self.beta}

    def identity_before(self) -> dict[str, object]:
        """Earlier releases had the answers in one row, whichever question they are to."""
        return {"data": self._before}

    def usable(self, engine: Engine, accumulation_steps: int) -> Engine:
        """Without packing and narrowing, and no micro-batches."""
        plain = engine.with_plain(self.UNUSED, "training on preferences (DPO) cannot use it")
        if accumulation_steps > 1:
            raise ValueError(f"got accumulation_steps={accumulation_steps}, expected 1: DPO here takes whole batches")
        return replace(plain, attention=self._attention(engine.attention))

    def _attention(self, asked: str) -> str:
        """On a CPU the model's own for "auto": the one chosen there rounds otherwise where there are gradients.

        The loss compares what is computed with and without them, to many digits.
        """
        own = asked == "auto" and device_of(self.model).type == "cpu"
        return text_config(self.model)._attn_implementation if own else asked

    def tokens(self, epoch: int) -> int:
        """Of both answers to every question, each with its prompt."""
        return self._tokens[epoch]

    def reads(self, schedule: Schedule) -> tuple[list[Encoded], int]:
        """The chosen answers and those drawn of the rejected, once for the reference and then as they are drawn."""
        drawn = draw_rejected(self.preferences, schedule.epochs, schedule.seed)
        pairs = [(question, wrong) for epoch in drawn for question, wrong in enumerate(epoch)]
        chosen = [rows[0] for rows in self.answers]
        rejected = {pair: self.answers[pair[0]][1 + pair[1]] for pair in pairs}
        sequences = chosen + list(rejected.values())
        trained = schedule.epochs * _tokens_of(chosen) + _tokens_of(rejected[pair] for pair in pairs)
        return sequences, _tokens_of(sequences) + trained

    def as_it_was(self):
        """TRL sets modes, padding, tags and a forward of its own."""
        return _as_it_was(self.model, self.tokenizer)

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
        """The prefix cache is filled first, then the references are computed, with it."""
        collator = CompletionCollator(pad_token_id(self.tokenizer), logits=logit_rows(self.model))
        cache = {"gb": engine.prefix_cache_gb, "progress": progress}
        how = {"folder": folder, "on_epoch": on_epoch, "callbacks": callbacks, "progress": progress, "keep": keep}
        with prefix_cached(attachment, self.reads(schedule)[0], collator, **cache) as found:
            add = found.add if isinstance(found, PrefixCollator) else None
            yield self._trainer(attachment, schedule, engine, add, **how)

    def _trainer(
        self,
        attachment: Attachment,
        schedule: Schedule,
        engine: Engine,
        add,
        *,
        folder,
        on_epoch,
        progress,
        keep,
        callbacks,
    ) -> Trainer:
        from datasets import Dataset
        from trl import DPOConfig

        drawn = draw_rejected(self.preferences, schedule.epochs, schedule.seed)
        index = {pair: number for number, pair in enumerate(sorted({p for epoch in drawn for p in enumerate(epoch)}))}
        chosen = [(self.preferences[question], rejected) for question, rejected in index]
        texts = {
            "prompt": [preference.prompt for preference, _ in chosen],
            "chosen": [preference.chosen for preference, _ in chosen],
            "rejected": [preference.rejected[rejected] for preference, rejected in chosen],
        }
        texts |= {mark: [isinstance(text, Rendered) for text in texts[name]] for name, mark in RENDERED.items()}
        how = {"max_length": self.limit, "batch_size": 2 * schedule.batch_size, "progress": progress}
        # rounded as the policy is, so that the loss begins at log 2
        how["as_trained"] = engine.frozen_products != "full"
        # said of all answers already
        with warnings.catch_warnings(action="ignore", category=BoundaryWarning):
            pairs = reference_logprobs(attachment, Dataset.from_dict(texts), self.tokenizer, add=add, **how)
        lengths = [_pair_tokens(pair) for pair in pairs]
        self._tokens = [sum(lengths[index[pair]] for pair in enumerate(epoch)) for epoch in drawn]
        # TRL and transformers disagree on the name of a switch that is off here
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            arguments = training_arguments(
                self.model,
                folder,
                schedule,
                progress=progress,
                keep=keep,
                kind=DPOConfig,
                beta=self.beta,
                precompute_ref_log_probs=True,
                max_length=None,
                disable_dropout=False,
                # the model's own dtype, and no layer computed twice
                bf16=False,
                gradient_checkpointing=False,
            )
        return _preference_trainer().AttachmentDPOTrainer(
            attachment,
            pairs,
            [[index[pair] for pair in enumerate(epoch)] for epoch in drawn],
            l1=schedule.l1,
            on_epoch=on_epoch,
            callbacks=list(callbacks),
            args=arguments,
            processing_class=self.tokenizer,
            group_by_length=engine.group_by_length,
            head=longest_head(self.model, self.reads(schedule)[0], 2 * schedule.batch_size),
            add=add,
            shown=lambda question: str(self.preferences[question].prompt)[:SHOWN],
        )

    def metrics(self, batch_size: int, progress: bool) -> dict[str, float]:
        """Nothing: preferences bring no questions to judge by."""
        return {}

    def looked_at(self, recipe: Recipe) -> list[Encoded]:
        """Of each preference, or of those drawn, the chosen answer and a rejected one."""
        return [row for pair in self._contrasted(recipe) for row in pair]

    def losses(
        self, attachment: Attachment, recipe: Recipe, engine: Engine, progress: bool
    ) -> Generator[Tensor, None, None]:
        """DPO's loss to first order where the policy still is the reference: -beta/2 (log p(right) - log p(wrong))."""
        right, wrong = zip(*self._contrasted(recipe), strict=True)
        batches = zip(
            first_epoch(self.model, self.tokenizer, right, recipe, engine, progress, order_of=right),
            first_epoch(self.model, self.tokenizer, wrong, recipe, engine, False, order_of=right),
            strict=True,
        )
        for (better, share), (worse, _) in batches:
            difference = loss_sum(self.model, better) - loss_sum(self.model, worse)
            yield self.beta / 2 * share.own(difference) / share.rows

    def _contrasted(self, recipe: Recipe) -> list[list[Encoded]]:
        drawn = looked_at(self.n_examples, recipe)
        pairs = contrasts(Task("preferences", [], [], preferences=tuple(self.preferences)), recipe.seed)
        with warnings.catch_warnings(action="ignore", category=BoundaryWarning):
            answers = [(pairs[i].prompt, (pairs[i].right, pairs[i].wrong)) for i in drawn]
            return encode_answers(self.tokenizer, answers, self.limit)


def draw_rejected(preferences: Sequence[Preference], epochs: int, seed: int) -> list[list[int]]:
    """Per epoch and question the index of the rejected answer to train on; the same for the same (seed, epoch)."""
    draws = []
    for epoch in range(epochs):
        drawn = random.Random(f"{seed} {epoch}")
        draws.append([drawn.randrange(len(preference.rejected)) for preference in preferences])
    return draws


def preferences_of(data: Iterable[Preference | Mapping[str, object]]) -> tuple[Preference, ...]:
    """Preferences from what a `Preferences` holds. Raises ValueError naming the row that is none."""
    rows = enumerate(given_examples(data), start=1)
    return tuple(as_preference(row, f"preference {number}") for number, row in rows)


def _preference_trainer():
    # seconds to import, and an extra
    with needing("TRL", "preferences", "DPO"):
        from lofit_fast.training import preference_trainer
    return preference_trainer


def _tokens_of(rows: Iterable[Encoded]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def _pair_tokens(pair: dict) -> int:
    """Of both answers, each with its prompt."""
    return 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])


@contextmanager
def _as_it_was(model: nn.Module, tokenizer) -> Iterator[None]:
    config, generation = text_config(model), model.generation_config
    places = [(config, "pad_token_id"), (generation, "pad_token_id")]
    places += [(model, "model_tags"), (tokenizer, "pad_token")]
    before = [(place, name, getattr(place, name, None)) for place, name in places]
    forward = vars(model).get("forward")
    try:
        with undisturbed(model):
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
        vars(model).pop("forward", None)
        if forward is not None:
            model.forward = forward
