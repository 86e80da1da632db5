"""The two steps of LoFiT: learn scales on every head, keep the best heads, learn offsets on those."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from lofit_fast.config import Head, LofitConfig, Recipe
from lofit_fast.data.encode import as_example, encode, encode_prompt, pad_token_id
from lofit_fast.data.pack import collator_of
from lofit_fast.evaluation.judge import answer_length, check_room, exact_match_accuracy
from lofit_fast.heads import head_scores, offset_norms, select_heads
from lofit_fast.patching.architectures import find_projections, fingerprint, text_config
from lofit_fast.patching.handle import LofitHandle, handle_of, load, patch
from lofit_fast.selection.early_stop import SettledHeads
from lofit_fast.tasks.task import Example
from lofit_fast.training.arguments import training_arguments
from lofit_fast.training.cost import peak_memory, rates
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.auto import settle_on
from lofit_fast.training.prefix_cache.cache import prefix_cached
from lofit_fast.training.run_folder import RunFolder, data_digest, last_checkpoint, weights_digest
from lofit_fast.training.trainer import LofitTrainer, Rows, undisturbed

Examples = Sequence[Example | Mapping[str, str]]
Component = Literal["scale", "offset"]
# what step 1 can train, and how a head is scored by it
SCORES = {"scale": head_scores, "offset": offset_norms}


@dataclass(frozen=True)
class FitResult:
    """What a run has produced.

    handle: of the model, patched with the tuned offsets. heads: (layer, head), best first. scores: (layers, heads),
    the scale norms of step 1, or None when the heads were given. history: a dict per epoch and stage.
    metrics: per stage ("select", "tune"): seconds, tokens_per_s (real tokens, not padding), examples_per_s,
    peak_memory_bytes (above what was held before the stage; see `measure.peak_memory`), exact_match.
    """

    handle: LofitHandle
    heads: list[Head]
    scores: Tensor | None
    history: list[dict]
    metrics: dict[str, dict[str, float]]


def fit(
    model: nn.Module,
    tokenizer,
    train: Examples,
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    eval_data: Examples | None = None,
    heads: Sequence[Head] | None = None,
    step1_dir: Path | str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    progress: bool = True,
) -> FitResult:
    """Run LoFiT: step 1 (select), top heads, step 2 (tune). The model comes back patched with the tuned offsets.

    train, eval_data: tasks' Examples, or mappings with "prompt" and "completion". eval_data gives a loss per epoch and
    the exact match after each step. heads: skip step 1 and tune these. step1_dir: a folder that runs share: step 1 is
    taken from there when one of the same settings, model and data has left it, and trained there otherwise.
    engine: how steps are run; None means the defaults. callbacks: of transformers' Trainer, for both steps.
    output_dir: the run folder; a run that was interrupted goes on from its last epoch when resume is on.
    Raises ValueError for empty data, an example without labels or too long, a folder with another run in it, more
    heads than there are; OSError for a folder that cannot be written; FloatingPointError when training diverges. After
    an error the model is as it was, and the folder holds whole files only.
    """
    recipe = recipe or Recipe()
    if handle_of(model) is not None:
        raise ValueError("the model is already patched: unpatch() its handle before fit")
    stages = _Stages(model, tokenizer, recipe, engine or Engine(), train, eval_data, progress, callbacks)
    stages.check_heads(heads)
    run = RunFolder.open(output_dir, stages.identity(heads), resume)
    if run.heads is None and heads is not None:
        run.write_heads(heads, None)
    elif run.heads is None and step1_dir is not None:
        stages.adopt(run, Path(step1_dir))
    elif run.heads is None:
        stages.select(run, resume)
    return stages.tune(run, resume)


def select_by_training(
    model: nn.Module,
    tokenizer,
    train: Examples,
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    component: Component = "scale",
    engine: Engine | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    progress: bool = True,
) -> RunFolder:
    """Step 1 alone: the run folder, with `heads`, `scores` and `metrics["select"]`; the model is as it was.

    component: "scale" is LoFiT's; "offset" trains offsets on all heads with the same recipe and scores by their norm.
    Everything else, errors too, as in `fit`, which goes on with step 2 in a folder of scales.
    """
    stages = _Stages(model, tokenizer, recipe or Recipe(), engine or Engine(), train, None, progress, callbacks)
    stages.check_heads(None)
    run = RunFolder.open(output_dir, stages.identity(None, component), resume)
    if run.heads is None:
        stages.select(run, resume, component)
    return run


class _Stages:
    """Everything the two steps share: encoded data, the recipe, the way a step is trained and measured."""

    def __init__(self, model, tokenizer, recipe, engine, train: Examples, eval_data, progress, callbacks) -> None:
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.recipe, self.engine, self.callbacks = recipe, engine, callbacks
        self.projections = find_projections(model)
        if not len(train):
            raise ValueError("the training data is empty: expected at least one example")
        context = getattr(text_config(model), "max_position_embeddings", None)
        limit = min((n for n in (recipe.max_length, context) if n is not None), default=None)
        self.train = [encode(tokenizer, example, limit) for example in train]
        self.eval_examples = [as_example(example) for example in eval_data or ()]
        self.eval = [encode(tokenizer, example, limit) for example in self.eval_examples]
        self.answer_length = answer_length(tokenizer, self.eval_examples)
        check_room(model, [encode_prompt(tokenizer, e.prompt) for e in self.eval_examples], self.answer_length)

    def check_heads(self, heads: Sequence[Head] | None) -> None:
        """Fail before training, not after it, on heads that cannot be chosen."""
        top, lowest = self.recipe.top, self.recipe.min_layer
        total = sum(p.n_heads for p in self.projections if p.layer >= lowest)
        if not total:
            raise ValueError(f"min_layer is {lowest}, but the model's last layer is {self.projections[-1].layer}")
        if heads is None:
            if isinstance(top, int) and top > total:
                at = f" in layers from {lowest}" if lowest else ""
                raise ValueError(f"asked for the top {top} heads, but the model has {total}{at}")
        else:
            below = [tuple(pair) for pair in LofitConfig(offset=heads).offset if pair[0] < lowest]
            if below:
                raise ValueError(f"min_layer is {lowest}, but the given heads are in layers below: {below}")
            LofitHandle(self.model, LofitConfig(offset=heads), self.projections)

    def identity(self, heads: Sequence[Head] | None, component: Component = "scale") -> dict:
        """What makes two runs the same one."""
        # what few runs have is named by those alone
        special = {} if component == "scale" else {"component": component}
        if stops := [callback.settings for callback in self.callbacks if isinstance(callback, SettledHeads)]:
            special["early_stop"] = stops
        return special | {
            "recipe": asdict(self.recipe),
            "model": {
                **fingerprint(self.model, self.projections).as_dict(),
                "weights": weights_digest(p.module for p in self.projections),
            },
            "data": data_digest(self.train),
            "eval_data": data_digest(self.eval),
            "heads": None if heads is None else [list(pair) for pair in heads],
            # of the engine's knobs the one that says which examples share a batch
            "group_by_length": self.engine.group_by_length,
        }

    def select(self, run: RunFolder, resume: bool, component: Component = "scale") -> None:
        """Step 1: leaves the heads and their scores in the run, and the model as it was."""
        recipe = self.recipe
        handle = patch(self.model, self._config(**{component: "all"}))
        try:
            metrics = self._train(handle, run, "select", recipe.select_lr, recipe.select_epochs, recipe.l1, resume)
            handle.save(run.path / "select" / "adapter")
            scores = SCORES[component](handle)
        finally:
            handle.unpatch()
        run.record("select", metrics)
        run.write_heads(select_heads(scores, recipe.top, recipe.min_layer), scores)

    def adopt(self, run: RunFolder, folder: Path) -> None:
        """Step 1 from the one that runs of the same settings share, trained there first if none has."""
        identity = self.identity(None) | {"recipe": self.recipe.of_step1()}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        shared = RunFolder.open(folder / digest, identity, resume=True)
        if shared.heads is None:
            self.select(shared, resume=True)
        run.adopt(shared, select_heads(shared.scores, self.recipe.top, self.recipe.min_layer))

    def tune(self, run: RunFolder, resume: bool) -> FitResult:
        """Step 2, from the base model; or its saved result when the run is done."""
        recipe = self.recipe
        if run.stage == "done":
            handle = load(self.model, run.path / "adapter")
        else:
            handle = patch(self.model, self._config(offset=run.heads))
            try:
                metrics = self._train(handle, run, "tune", recipe.tune_lr, recipe.tune_epochs, 0.0, resume)
                handle.save(run.path / "adapter")
                run.record("tune", metrics)
            except BaseException:
                handle.unpatch()
                raise
        return FitResult(handle, run.heads, run.scores, run.history, run.metrics)

    def _config(self, **heads) -> LofitConfig:
        return LofitConfig(init_std=self.recipe.init_std, seed=self.recipe.seed, **heads)

    def _train(self, handle, run: RunFolder, stage: str, lr: float, epochs: int, l1: float, resume: bool) -> dict:
        folder = run.path / stage
        checkpoint = last_checkpoint(folder) if resume else None
        pad = pad_token_id(self.tokenizer)
        engine, why = settle_on(handle, self.engine, self.train, pad, self.recipe.batch_size, epochs)
        if self.progress:
            print(why, file=sys.stderr)
        collator = collator_of(engine, pad)
        # step 1 scales every layer, and leaves nothing below to keep
        prefix_gb = self.engine.prefix_cache_gb if stage == "tune" else 0.0
        tokens = sum(len(row["input_ids"]) for row in self.train)
        steps = math.ceil(len(self.train) / self.recipe.batch_size)

        def done(rows: Sequence[dict]) -> tuple[float, float]:
            """Examples and tokens of epochs, the last of which may have been cut short."""
            share = sum(len(row["step_losses"]) for row in rows) / steps
            return share * len(self.train), share * tokens

        def on_epoch(row: dict) -> None:
            run.append_history({"stage": stage, **row, **rates(*done([row]), row["seconds"])})

        started = time.perf_counter()
        with (
            undisturbed(self.model),
            prepared(self.model, engine),
            peak_memory(next(self.model.parameters()).device) as memory,
            prefix_cached(
                handle, self.train + self.eval, collator, gb=prefix_gb, progress=self.progress
            ) as with_prefix,
        ):
            filling = time.perf_counter() - started
            LofitTrainer(
                handle,
                l1=l1,
                group_by_length=self.engine.group_by_length,
                on_epoch=on_epoch,
                callbacks=list(self.callbacks),
                args=self._arguments(folder, lr, epochs),
                train_dataset=Rows(self.train),
                eval_dataset=Rows(self.eval) if self.eval else None,
                data_collator=with_prefix,
            ).train(resume_from_checkpoint=checkpoint)
        # the epochs from the history, so that an interrupted run counts whole
        rows = [row for row in run.history if row["stage"] == stage]
        seconds = filling + sum(row["seconds"] for row in rows)
        metrics = {"seconds": seconds, **rates(*done(rows), seconds)}
        metrics["peak_memory_bytes"] = memory.peak_bytes
        if self.eval_examples:
            metrics["exact_match"] = exact_match_accuracy(
                self.model,
                self.tokenizer,
                self.eval_examples,
                max_new_tokens=self.answer_length,
                batch_size=self.recipe.eval_batch_size,
                progress=self.progress,
            )
        return metrics

    def _arguments(self, folder: Path, lr: float, epochs: int) -> TrainingArguments:
        recipe = self.recipe
        return training_arguments(
            self.model,
            folder,
            lr=lr,
            epochs=epochs,
            batch_size=recipe.batch_size // recipe.accumulation_steps,
            seed=recipe.seed,
            max_grad_norm=recipe.max_grad_norm,
            progress=self.progress,
            gradient_accumulation_steps=recipe.accumulation_steps,
            per_device_eval_batch_size=recipe.eval_batch_size,
            eval_strategy="epoch" if self.eval else "no",
            save_strategy="epoch",
            save_total_limit=1,
            prediction_loss_only=True,
        )
