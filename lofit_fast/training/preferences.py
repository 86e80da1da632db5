"""DPO (arXiv:2305.18290) on preferences, through TRL: for any attachment, and for both steps of LoFiT."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from lofit_fast.config import Head, LofitConfig, Recipe
from lofit_fast.data.encode import encode
from lofit_fast.evaluation.logprobs import reference_logprobs
from lofit_fast.heads import head_scores, select_heads
from lofit_fast.patching.architectures import find_projections, fingerprint, text_config
from lofit_fast.patching.handle import handle_of, load, patch
from lofit_fast.patching.layer import eval_mode
from lofit_fast.tasks.task import Example, Preference
from lofit_fast.training.arguments import training_arguments
from lofit_fast.training.cost import peak_memory, rates
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.fit import FitResult
from lofit_fast.training.run_folder import RunFolder, data_digest, weights_digest


def train_dpo(
    attachment: Attachment,
    tokenizer,
    preferences: Sequence[Preference],
    *,
    lr: float,
    epochs: int,
    beta: float = 0.5,
    l1: float = 0.0,
    batch_size: int = 8,
    seed: int = 42,
    output_dir: Path | str,
    max_grad_norm: float = 1.0,
    max_length: int | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> dict:
    """Train an attachment's parameters with DPO against the model it is attached to.

    -log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), mean over a batch, + l1 * sum |a|.
    One rejected answer per question and epoch, see `draw_rejected`; AdamW without decay, a learning rate that falls
    linearly to 0. The reference is computed once with the attachment disabled: no second model is loaded.
    on_epoch: called with a dict after every epoch, as by `LofitTrainer`, with rates in questions and in real tokens of
    both answers. callbacks: of transformers' Trainer.
    max_length: longest prompt and answer in tokens; None means the model's context. output_dir: TRL's; nothing is kept
    in it.
    Returns {"seconds", "loss": [mean of each epoch, without the L1 term], "tokens_per_s", "examples_per_s"}; the
    references are part of these seconds.
    Raises ImportError without TRL, ValueError for no preferences, no epochs or a pair that is too long,
    FloatingPointError when training diverges. The model is left as it was but for the parameters.
    """
    trainers = _trainers()
    if not preferences or epochs < 1:
        raise ValueError(f"expected preferences and epochs to train on, got {len(preferences)} and {epochs}")
    model, rows = attachment.model, []
    trained = {id(parameter) for parameter in attachment.parameters()}
    if not trained or not trained <= {id(parameter) for parameter in model.parameters()}:
        raise ValueError("expected an attachment with parameters in its model, to train")
    started, tokens = time.perf_counter(), []
    steps = math.ceil(len(preferences) / batch_size)

    def done(rows: Sequence[dict]) -> tuple[float, float]:
        """Questions and tokens of epochs, the last of which may have been cut short."""
        shares = [(len(row["step_losses"]) / steps, row["epoch"] - 1) for row in rows]
        return sum(share for share, _ in shares) * len(preferences), sum(share * tokens[at] for share, at in shares)

    def report(row: dict) -> None:
        row |= rates(*done([row]), row["seconds"])
        rows.append(row)
        if on_epoch is not None:
            on_epoch(row)

    drawn = draw_rejected(preferences, epochs, seed)
    index = {pair: number for number, pair in enumerate(sorted({p for epoch in drawn for p in enumerate(epoch)}))}
    with _as_it_was(model, tokenizer):
        pairs = reference_logprobs(
            attachment,
            _dataset(preferences, list(index)),
            tokenizer,
            max_length=_limit(model, max_length),
            batch_size=2 * batch_size,
            progress=progress,
        )
        lengths = [_tokens(pair) for pair in pairs]
        tokens += [sum(lengths[index[pair]] for pair in enumerate(epoch)) for epoch in drawn]
        trainers.AttachmentDPOTrainer(
            attachment,
            pairs,
            [[index[pair] for pair in enumerate(epoch)] for epoch in drawn],
            l1=l1,
            on_epoch=report,
            callbacks=list(callbacks),
            args=_arguments(
                model,
                output_dir,
                beta,
                lr=lr,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_grad_norm=max_grad_norm,
                progress=progress,
            ),
            processing_class=tokenizer,
        ).train()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "loss": [row["loss"] for row in rows], **rates(*done(rows), seconds)}


def fit_preferences(
    model: nn.Module,
    tokenizer,
    preferences: Sequence[Preference],
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    heads: Sequence[Head] | None = None,
    beta: float = 0.5,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> FitResult:
    """Both steps of LoFiT with DPO instead of completions, in a run folder as `fit` writes it.

    heads: skip step 1 and tune these. resume: go on after the last finished step; there are no checkpoints inside one.
    callbacks: of transformers' Trainer, for both steps.
    The model comes back patched with the tuned offsets; after an error it is as it was.
    Raises what `train_dpo` and `fit` raise; micro-batches (recipe.accumulation_steps above 1) are not supported.
    """
    recipe = recipe or Recipe()
    _trainers()
    if handle_of(model) is not None:
        raise ValueError("the model is already patched: unpatch() its handle before fit_preferences")
    if recipe.accumulation_steps > 1:
        raise ValueError(
            f"got accumulation_steps={recipe.accumulation_steps}, expected 1: DPO here takes whole batches"
        )
    _check_heads(model, recipe, heads)
    run = RunFolder.open(output_dir, _identity(model, tokenizer, preferences, recipe, heads, beta), resume)

    def train(handle, stage: str, lr: float, epochs: int, l1: float) -> dict[str, float]:
        with peak_memory(next(model.parameters()).device) as memory:
            trained = train_dpo(
                handle,
                tokenizer,
                preferences,
                lr=lr,
                epochs=epochs,
                beta=beta,
                l1=l1,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                output_dir=run.path / stage,
                max_grad_norm=recipe.max_grad_norm,
                max_length=recipe.max_length,
                on_epoch=lambda row: run.append_history({"stage": stage, **row}),
                callbacks=callbacks,
                progress=progress,
            )
        kept = {key: trained[key] for key in ("seconds", "tokens_per_s", "examples_per_s")}
        return {**kept, "peak_memory_bytes": memory.peak_bytes}

    if run.heads is None and heads is not None:
        run.write_heads(heads, None)
    if run.heads is None:
        handle = patch(model, _config(recipe, scale="all"))
        try:
            metrics = train(handle, "select", recipe.select_lr, recipe.select_epochs, recipe.l1)
            handle.save(run.path / "select" / "adapter")
            scores = head_scores(handle)
        finally:
            handle.unpatch()
        run.record("select", metrics)
        run.write_heads(select_heads(scores, recipe.top, recipe.min_layer), scores)
    if run.stage == "done":
        return FitResult(load(model, run.path / "adapter"), run.heads, run.scores, run.history, run.metrics)
    handle = patch(model, _config(recipe, offset=run.heads))
    try:
        metrics = train(handle, "tune", recipe.tune_lr, recipe.tune_epochs, 0.0)
        handle.save(run.path / "adapter")
        run.record("tune", metrics)
    except BaseException:
        handle.unpatch()
        raise
    return FitResult(handle, run.heads, run.scores, run.history, run.metrics)


def draw_rejected(preferences: Sequence[Preference], epochs: int, seed: int) -> list[list[int]]:
    """Per epoch and question the index of the rejected answer to train on; the same for the same (seed, epoch)."""
    draws = []
    for epoch in range(epochs):
        drawn = random.Random(f"{seed} {epoch}")
        draws.append([drawn.randrange(len(preference.rejected)) for preference in preferences])
    return draws


def _trainers():
    # seconds to import, and an extra
    try:
        from lofit_fast.training import preference_trainer
    except ImportError as error:
        raise ImportError(f'DPO needs TRL: pip install "lofit-fast[paper]" ({error})') from error
    return preference_trainer


def _dataset(preferences: Sequence[Preference], pairs: Sequence[tuple[int, int]]):
    from datasets import Dataset

    chosen = [(preferences[question], rejected) for question, rejected in pairs]
    return Dataset.from_dict(
        {
            "prompt": [preference.prompt for preference, _ in chosen],
            "chosen": [preference.chosen for preference, _ in chosen],
            "rejected": [preference.rejected[rejected] for preference, rejected in chosen],
        }
    )


def _tokens(pair: dict) -> int:
    """Of both answers, each with its prompt."""
    return 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])


def _limit(model: nn.Module, max_length: int | None) -> int | None:
    context = getattr(text_config(model), "max_position_embeddings", None)
    return min((n for n in (max_length, context) if n is not None), default=None)


def _config(recipe: Recipe, **heads) -> LofitConfig:
    return LofitConfig(init_std=recipe.init_std, seed=recipe.seed, **heads)


def _check_heads(model: nn.Module, recipe: Recipe, heads: Sequence[Head] | None) -> None:
    """Fail before training, not after it, on heads that cannot be chosen."""
    if heads is not None:
        patch(model, _config(recipe, offset=heads)).unpatch()
        return
    projections = find_projections(model)
    select_heads(torch.zeros(len(projections), projections[0].n_heads), recipe.top, recipe.min_layer)


def _identity(model, tokenizer, preferences, recipe: Recipe, heads, beta: float) -> dict:
    """What makes two runs the same one; raises for an answer that is too long."""
    projections, limit = find_projections(model), _limit(model, recipe.max_length)
    answers = [(p.prompt, answer) for p in preferences for answer in (p.chosen, *p.rejected)]
    return {
        "recipe": asdict(recipe),
        "beta": beta,
        "model": {
            **fingerprint(model, projections).as_dict(),
            "weights": weights_digest(p.module for p in projections),
        },
        "data": data_digest([encode(tokenizer, Example(*pair), limit) for pair in answers]),
        "heads": None if heads is None else [list(pair) for pair in heads],
    }


@contextmanager
def _as_it_was(model: nn.Module, tokenizer) -> Iterator[None]:
    """TRL sets modes, padding, tags and a forward of its own; a scope after which all are what they were."""
    config, generation = text_config(model), model.generation_config
    places = [(config, "pad_token_id"), (generation, "pad_token_id"), (model.config, "use_cache")]
    places += [(model, "model_tags"), (tokenizer, "pad_token")]
    before = [(place, name, getattr(place, name, None)) for place, name in places]
    forward = vars(model).get("forward")
    try:
        with eval_mode(model):
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
        vars(model).pop("forward", None)
        if forward is not None:
            model.forward = forward


def _arguments(model: nn.Module, output_dir: Path | str, beta: float, **options):
    from trl import DPOConfig

    # TRL and transformers disagree on the name of a switch that is off here
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return training_arguments(
            model,
            output_dir,
            kind=DPOConfig,
            **options,
            beta=beta,
            precompute_ref_log_probs=True,
            max_length=None,
            disable_dropout=False,
            # the model's own dtype, and no layer computed twice
            bf16=False,
            gradient_checkpointing=False,
        )
