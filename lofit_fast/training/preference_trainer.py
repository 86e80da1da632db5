"""TRL's DPOTrainer, for any attachment: references that are given, one rejected answer per question and epoch, L1."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from lofit_fast import ranks
from lofit_fast.data.collate import Batch, Logits, on_device
from lofit_fast.data.encode import IGNORED, Encoded, pad_token_id
from lofit_fast.data.lengths import GroupedByLength
from lofit_fast.data.padding import padded, padded_on_the_right, rectangle
from lofit_fast.evaluation.logprobs import keeping, labelled_log_probs, labelled_rows, long_log_probs, n_following
from lofit_fast.models.linear_loss import FrozenHead
from lofit_fast.models.logit_rows import logit_rows
from lofit_fast.models.trials import difference, rounding, trial_examples, trying
from lofit_fast.patching.answer_positions import answers_of
from lofit_fast.patching.patched import acting_on
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.training.attachment_training import AttachmentTraining
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.finite_steps import Shown
from lofit_fast.training.frozen_base import admitted
from lofit_fast.training.preference_loss import NOT_THE_MODELS, dpo_loss
from lofit_fast.training.shared_batches import ShareCollator, sharers
from lofit_fast.training.trainer import leave_in_place, report_epochs


class ReferencedDPOTrainer(DPOTrainer):
    """DPOTrainer for data from `lofit_fast.reference_logprobs`, taken as it is.

    Nothing is tokenized again, and no reference is computed, or loaded as a second model: TRL's own way would compute
    it from the active model, adapter and all. Use it with DPOConfig(precompute_ref_log_probs=True). Sends no telemetry.
    On a CPU logits are made for labelled tokens only, where TRL would make all; the loss is TRL's. Elsewhere they are
    so for a model whose log-probabilities TRL's own head does not find, see `trl_agrees`.
    head: of `models.head_trial.frozen_head`, for answers whose logits would be too large at once; None makes them all.
    What would give the model other numbers than its references were made of is refused with a ValueError: pairs longer
    than DPOConfig's max_length (1024 unless said), of which TRL would cut the end off, and autocast (bf16, on by
    default) to another dtype than the model's.
    TRL puts a forward of its own on the model, which stays: take "forward" out of vars(model) afterwards.
    """

    def __init__(self, model: nn.Module, *, head: FrozenHead | None = None, **options) -> None:
        _check_as_referenced(model, options)
        given, logits = vars(model).get("forward", model.forward), logit_rows(model)
        with admitted(model), _unhashed(model):
            super().__init__(model=model, **options)
        ours = labelled_only(given, logits, head)
        if device_of(model).type == "cpu" or not trl_agrees(model, ours):
            model.forward = ours

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset

    def _send_telemetry(self) -> None:
        pass


class AttachmentDPOTrainer(AttachmentTraining, ReferencedDPOTrainer):
    """Trains an attachment's parameters on questions with several rejected answers.

    pairs: of `reference_logprobs`, all pairs that are drawn. draws: per epoch and question the index of its pair.
    l1, on_epoch: see `AttachmentTraining`. group_by_length: batches of questions of like length; else any.
    add: adds to a batch what belongs to its rows, such as `prefix_cache.PrefixCollator.add`. shown: a short text of a
    question, by its number from 0.
    Off the CPU the loss and what TRL logs of it stay on the device until they are logged; see `preference_loss`.
    """

    def __init__(
        self,
        attachment: Attachment,
        pairs: Dataset,
        draws: Sequence[Sequence[int]],
        *,
        l1: float,
        on_epoch: Callable[[dict], None],
        callbacks: Sequence[TrainerCallback],
        args,
        processing_class,
        group_by_length: bool = True,
        head: FrozenHead | None = None,
        add: Callable[[Batch, Sequence[Encoded]], Batch] | None = None,
        shown: Shown | None = None,
    ) -> None:
        self.handle, self.l1, self.on_epoch = attachment, l1, on_epoch
        rows = list(pairs)
        lengths = [max(map(_length, (rows[epoch[question]] for epoch in draws))) for question in range(len(draws[0]))]
        # of one length, their order is a plain shuffle
        grouped = lengths if group_by_length else [1] * len(lengths)
        self.sampler = GroupedByLength(grouped, args.per_device_train_batch_size, args.seed)
        collate = _with(add, DataCollatorForPreference(pad_token_id(processing_class)))

        def drawn(batch: list[dict]) -> Batch:
            # the sampler knows the epoch whose batches are being made
            return collate([rows[draws[self.sampler.epoch][row["question"]]] for row in batch])

        super().__init__(
            attachment.model,
            head=head,
            args=args,
            callbacks=callbacks,
            processing_class=processing_class,
            train_dataset=Dataset.from_dict({"question": range(len(lengths))}),
            data_collator=self.noted(
                ShareCollator(drawn) if sharers(attachment.model) > 1 else drawn, lambda row: row["question"]
            ),
        )
        # the routers are frozen, and a penalty on them is no part of DPO
        self.aux_loss_enabled = False
        leave_in_place(self)
        report_epochs(self, shown)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, plus l1 * sum |a| and the penalty while training."""
        # TRL's collator pads on the right
        with padded_on_the_right():
            if self.sender is not None and model.training and self._is_plain_dpo():
                loss = self._unread_loss(model, inputs)
            else:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return loss
        return self.noted_loss(loss if self.shared is None else self.shared.part_of_rows(loss), 1)

    def create_model_card(self, *_, **__) -> None:
        """Nothing: TRL would write one beside the checkpoints, which are a run's own."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with what has stayed on the device read now, of every process."""
        for values in self._metrics["train"].values():
            if any(map(torch.is_tensor, values)):
                values[:] = torch.stack(values).tolist()
        if self.shared is not None:
            for found in ranks.gathered(dict(self._metrics["train"]))[1:]:
                for name, values in found.items():
                    self._metrics["train"][name] += values
        super().log(logs, start_time)

    def _is_plain_dpo(self) -> bool:
        """Whether the loss is DPO's own, and none of the variants that TRL knows too."""
        args = self.args
        plain = list(args.loss_type) == ["sigmoid"] and args.f_divergence_type == "reverse_kl"
        weights = getattr(args, "loss_weights", None)
        return plain and args.ld_alpha is None and not args.use_weighting and weights in (None, [1.0])

    def _unread_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """TRL's loss, of which TRL would read some twenty numbers per step."""
        given = {name: value for name, value in inputs.items() if name not in NOT_THE_MODELS}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        outputs = model(**given, use_cache=False, labels=labels, fused_lm_head=True)
        loss, watched = dpo_loss(outputs, inputs, self.beta)
        for name, value in watched.items():
            self._metrics["train"][name].append(value)
        return loss

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler


def _check_as_referenced(model: nn.Module, options: Mapping) -> None:
    """Raise ValueError for settings under which the model computes what its references are not of.

    options: of the trainer.
    """
    args, dtype = options.get("args"), dtype_of(model)
    for name, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name, False) and dtype is not wanted:
            raise ValueError(
                f"got {name}=True (DPOConfig's own default may be that) and a model in {dtype}, as its references are: "
                f"under autocast its log-probabilities are others. Expected {name}=False, or a model in {wanted}"
            )
    most = getattr(args, "max_length", None)
    given = [options.get(name) for name in ("train_dataset", "eval_dataset")]
    for data in [one for some in given for one in (some.values() if isinstance(some, Mapping) else [some])]:
        if most is None or "prompt_ids" not in (getattr(data, "column_names", None) or ()):
            continue
        longest = max(map(_length, data), default=0)
        if longest > most:
            raise ValueError(
                f"got max_length={most} and a pair of {longest} tokens, of which TRL would cut the end off, while its "
                "reference is of the whole answer: expected max_length=None, or one that all pairs fit in"
            )


@contextmanager
def _unhashed(model: nn.Module) -> Iterator[None]:
    """A scope in which TRL finds no weights to hash, as it does to know references that it has kept.

    These references are given. All weights would be read for it, and weights that processes hold together cannot be.
    """
    own = {"state_dict": vars(model)["state_dict"]} if "state_dict" in vars(model) else {}
    vars(model)["state_dict"] = dict
    try:
        yield
    finally:
        del vars(model)["state_dict"]
        vars(model).update(own)


def _with(add: Callable | None, collate: Callable) -> Callable[[list[dict]], Batch]:
    """A collator of pairs, the chosen answers first, to whose batches `add` adds."""

    def collated(pairs: list[dict]) -> Batch:
        texts = (pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs)
        return add(collate(pairs), [{"input_ids": text} for text in texts])

    return collate if add is None else collated


def _length(pair: dict) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def trl_agrees(model: nn.Module, ours: Callable) -> bool:
    """Whether a model with TRL's output head gives the log-probabilities of its own logits: tried on a few tokens.

    TRL takes what leaves the decoder to the head, and knows caps and scales by some names that configs have for them.
    A model that does anything else in between, or to its logits, would be trained on others than its reference's.
    ours: of `labelled_only`. Where that cannot be tried, TRL is taken at its word.
    """
    rows, theirs = trial_examples(model), model.forward
    ids, mask = padded([row["input_ids"] for row in rows], 0)
    labels = rectangle([row["labels"] for row in rows], IGNORED)
    batch = on_device({"input_ids": ids, "attention_mask": mask, "labels": labels}, device_of(model))

    def log_probs(forward: Callable) -> Tensor | None:
        """(1, B (S - 1)), or None where a forward raises whatever it may raise."""
        model.forward = forward
        try:
            return model(**batch, fused_lm_head=True).log_probs.reshape(1, -1)
        except Exception:
            return None
        finally:
            model.forward = theirs

    with trying(model), padded_on_the_right(), acting_on(model, answers_of(batch["labels"])):
        expected = log_probs(ours)
        got = None if expected is None else log_probs(theirs)
    return expected is None or (got is not None and difference(got, expected) <= rounding(model))


def labelled_only(given: Callable, logits: Logits = "rows", head: FrozenHead | None = None) -> Callable:
    """A forward that answers TRL's fused_lm_head=True as TRL's own does, from the logits of labelled tokens alone.

    given: the model's forward. logits: how it can be asked for them, see `models.logit_rows`. head: makes them in
    chunks where they are many.
    """

    @functools.wraps(given)
    def forward(*args, fused_lm_head: bool = False, labels: Tensor | None = None, **options):
        if not fused_lm_head:
            return given(*args, **options, labels=labels)
        if head is not None and head.is_long(n_following(labels)):
            called = functools.partial(given, *args)
            log_probs, rows, output = long_log_probs(called, options, labels, logits, head, watch=True)
            watched = _spread(rows._asdict(), labels)
        else:
            output = given(*args, **{**options, **keeping(labels, logits)})
            log_probs = labelled_log_probs(output, labels, logits)
            watched = _watched(labelled_rows(output.logits, labels, logits), labels)
        # of a mixture of experts, whose routers TRL asks for
        aux_loss = getattr(output, "aux_loss", None)
        return FusedCausalLMOutput(log_probs=log_probs, aux_loss=aux_loss, **watched)

    return forward


@torch.no_grad()
def _watched(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What TRL logs of the labelled positions, 0 elsewhere: entropy, mean_logits, is_top1, each (B, S - 1)."""
    following = labels[:, 1:]
    mask, wide = following != IGNORED, logits.detach().float()
    norm = wide.logsumexp(1)
    entropy = norm - ((wide - norm[:, None]).exp() * wide).sum(1)
    rows = {
        "entropy": entropy,
        "mean_logits": wide.mean(1),
        "is_top1": wide.argmax(1) == following[mask],
    }
    return _spread(rows, labels)


def _spread(rows: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Numbers of labelled tokens (labelled,) in their places (B, S - 1), 0 elsewhere."""
    mask = labels[:, 1:] != IGNORED
    return {name: row.new_zeros(mask.shape).masked_scatter(mask, row) for name, row in rows.items()}
