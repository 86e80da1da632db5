"""The two steps of LoFiT: learn scales on every head, keep the best heads, learn offsets on those. One driver."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from transformers import TrainerCallback

from lofit_fast.config import Head, LofitConfig, Recipe
from lofit_fast.extras import check_training
from lofit_fast.heads import select_heads
from lofit_fast.models.trials import remembering
from lofit_fast.patching.architectures import find_projections, fingerprint
from lofit_fast.patching.handle import LofitHandle, handle_of, load, patch
from lofit_fast.patching.head_norms import head_scores, offset_norms
from lofit_fast.patching.placement import dtype_of
from lofit_fast.patching.sharding import check_unsharded
from lofit_fast.tasks.task import Preference
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.auto import said
from lofit_fast.training.frozen_base import check_passes_gradients
from lofit_fast.training.objectives import BETA, Completions, EncodedObjective, Examples, Objective, Preferences
from lofit_fast.training.prefix_cache.worth import Worth, worth_of
from lofit_fast.training.run_folder import RunFolder, last_checkpoint, weights_digest
from lofit_fast.training.stage import cost_of, settle_for, train

Component = Literal["scale", "offset"]
# what step 1 can train, and how a head is scored by it
SCORES = {"scale": head_scores, "offset": offset_norms}


@dataclass(frozen=True)
class FitResult:
    """What a run has produced.

    handle: of the model, patched with the tuned offsets. heads: (layer, head), best first. scores: (layers, heads),
    the scale norms of step 1, or None when the heads were given. history: a dict per epoch and stage.
    metrics: per stage ("select", "tune"): seconds, tokens_per_s (real tokens, not padding), examples_per_s,
    peak_memory_bytes (above what was held before the stage; see `cost.peak_memory`), exact_match.
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
    """Run LoFiT on completions: step 1 (select), top heads, step 2 (tune). The model comes back patched.

    Args:
        model, tokenizer: an unpatched Hugging Face model and its tokenizer.
        train: tasks' Examples, or mappings with "prompt" and "completion": a list of them, a data set of the `datasets`
            library or a pandas DataFrame.
        recipe: how the steps are trained; None means the paper's.
        output_dir: the run folder; an interrupted run goes on from its last epoch when resume is on.
        engine: how steps are run; None means the defaults.
        eval_data: as train; gives a loss per epoch and the exact match after each step.
        heads: skip step 1 and tune these.
        step1_dir: a folder that runs share: step 1 is taken from there when one of the same settings, model and data
            has left it, and trained there otherwise.
        callbacks: of transformers' Trainer, for both steps.
        resume: whether to go on with the run in the folder.
        progress: whether bars and the engine's choice are shown.

    Raises:
        ValueError: empty data, an example without labels or too long, a folder with another run in it, more heads than
            there are, a sharded model, a quantized one that cannot be trained through.
        OSError: a folder that cannot be written.
        FloatingPointError: training diverges.
        ImportError: accelerate is not installed, which transformers trains with.

    After an error the model is as it was, and the folder holds whole files only.
    """
    how = {"engine": engine, "heads": heads, "step1_dir": step1_dir, "callbacks": callbacks}
    objective = Completions(train, () if eval_data is None else eval_data)
    return fit_objective(
        model, tokenizer, objective, recipe, output_dir=output_dir, resume=resume, progress=progress, **how
    )


def fit_preferences(
    model: nn.Module,
    tokenizer,
    preferences: Sequence[Preference | Mapping[str, object]],
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    heads: Sequence[Head] | None = None,
    beta: float = BETA,
    step1_dir: Path | str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    progress: bool = True,
) -> FitResult:
    """Run LoFiT with DPO on preferences: arguments, run folder and errors are those of `fit`.

    Args:
        preferences: a prompt, its chosen answer and its rejected ones each: `Preference`s, or mappings with the keys
            prompt, chosen and rejected, in a list, a data set of the `datasets` library or a pandas DataFrame.
        beta: of DPO's loss.

    Raises:
        ImportError: TRL, or what `fit` needs, is not installed.
        ValueError: as in `fit`, and for what DPO cannot use: packing, narrow, accumulation_steps.
    """
    how = {"engine": engine, "heads": heads, "step1_dir": step1_dir, "callbacks": callbacks}
    objective = Preferences(preferences, beta)
    return fit_objective(
        model, tokenizer, objective, recipe, output_dir=output_dir, resume=resume, progress=progress, **how
    )


def fit_objective(
    model: nn.Module,
    tokenizer,
    objective: Objective,
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    heads: Sequence[Head] | None = None,
    step1_dir: Path | str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    progress: bool = True,
) -> FitResult:
    """Both steps on any objective; see `fit`."""
    _check_unpatched(model)
    steps = _TwoSteps(model, tokenizer, objective, recipe or Recipe(), engine or Engine(), callbacks, progress)
    steps.check_heads(heads)
    run = RunFolder.open(output_dir, steps.identity(heads), resume)
    # what step 1 has tried, step 2 knows
    with remembering():
        if run.heads is None and heads is not None:
            run.write_heads(heads, None)
        elif run.heads is None and step1_dir is not None:
            steps.adopt(run, Path(step1_dir))
        elif run.heads is None:
            steps.select(run, resume)
        return steps.tune(run, resume)


def rehearse(
    model: nn.Module,
    tokenizer,
    objective: Objective,
    recipe: Recipe | None = None,
    *,
    engine: Engine | None = None,
    heads: Sequence[Head] | None = None,
    progress: bool = True,
) -> tuple[EncodedObjective, dict[str, Engine], Worth]:
    """All that `fit_objective` does before it opens the run folder, and nothing after: (the data, stage -> engine).

    And what a prefix cache would save in step 2: of the given heads, or if step 1 kept all that the recipe lets it.

    Everything that can be refused before training is refused here, with the same sentences. Nothing is changed or
    written; the engines are settled, as a new run's would be. Arguments and errors are those of `fit`.
    """
    _check_unpatched(model)
    steps = _TwoSteps(model, tokenizer, objective, recipe or Recipe(), engine or Engine(), (), progress)
    steps.check_heads(heads)
    with remembering():
        return steps.data, *steps.engines(heads)


def select_by_training(
    model: nn.Module,
    tokenizer,
    objective: Objective,
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
    steps = _TwoSteps(model, tokenizer, objective, recipe or Recipe(), engine or Engine(), callbacks, progress)
    steps.check_heads(None)
    run = RunFolder.open(output_dir, steps.identity(None, component), resume)
    if run.heads is None:
        steps.select(run, resume, component)
    return run


def _check_unpatched(model: nn.Module) -> None:
    if handle_of(model) is not None:
        raise ValueError("the model is already patched: unpatch() its handle before fit")


class _TwoSteps:
    """Everything the two steps share: the encoded data, the recipe, the way a step is trained and measured."""

    def __init__(self, model, tokenizer, objective: Objective, recipe: Recipe, engine: Engine, callbacks, progress):
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.callbacks, self.progress = callbacks, progress
        check_training()
        check_unsharded(model)
        check_passes_gradients(model)
        self.projections = find_projections(model)
        self.objective = objective
        self.data = objective.encoded(model, tokenizer, recipe.max_length, progress)
        self.asked, self.engine = engine, self.data.usable(engine, recipe.accumulation_steps)
        if min(recipe.select_epochs, recipe.tune_epochs) < self.data.least_epochs:
            raise ValueError(
                f"training on {objective.name} takes at least {self.data.least_epochs} epoch in each step, got "
                f"select_epochs={recipe.select_epochs} and tune_epochs={recipe.tune_epochs}"
            )

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
        for callback in self.callbacks:
            special |= getattr(callback, "identity", {})
        return special | {
            "objective": self.objective.name,
            "recipe": asdict(self.recipe),
            "model": {
                **fingerprint(self.model, self.projections).as_dict(),
                "weights": weights_digest(p.module for p in self.projections),
            },
            "dtype": str(dtype_of(self.model)).removeprefix("torch."),
            **self.data.identity(),
            "heads": None if heads is None else [list(pair) for pair in heads],
            # of the engine's knobs the one that says which examples share a batch
            "group_by_length": self.engine.group_by_length,
        }

    def select(self, run: RunFolder, resume: bool, component: Component = "scale") -> None:
        """Step 1: leaves the heads and their scores in the run, and the model as it was."""
        recipe = self.recipe
        handle = patch(self.model, self._config(**{component: "all"}))
        try:
            metrics = self._train(handle, run, "select", self._schedule(recipe.select_lr, recipe.select_epochs), resume)
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
        if run.stage == "done":
            handle = load(self.model, run.path / "adapter")
        else:
            handle = patch(self.model, self._config(offset=run.heads))
            try:
                schedule = replace(self._schedule(self.recipe.tune_lr, self.recipe.tune_epochs), l1=0.0)
                metrics = self._train(handle, run, "tune", schedule, resume)
                handle.save(run.path / "adapter")
                run.record("tune", metrics)
            except BaseException:
                handle.unpatch()
                raise
        return FitResult(handle, run.heads, run.scores, run.history, run.metrics)

    def _config(self, **heads) -> LofitConfig:
        return LofitConfig(init_std=self.recipe.init_std, seed=self.recipe.seed, **heads)

    def _schedule(self, lr: float, epochs: int) -> Schedule:
        shared = ("batch_size", "accumulation_steps", "l1", "max_grad_norm", "seed", "max_length", "eval_batch_size")
        return Schedule(lr, epochs, **{name: getattr(self.recipe, name) for name in shared})

    def _train(self, handle: LofitHandle, run: RunFolder, stage: str, schedule: Schedule, resume: bool) -> dict:
        engine = self._engine(handle, run, stage, schedule)
        if self.progress:
            print(said(engine), file=sys.stderr)
        folder = run.path / stage
        before, peak = train(
            handle,
            self.data,
            schedule,
            engine,
            folder=folder,
            on_epoch=lambda row: run.append_history({"stage": stage, **row}),
            callbacks=self.callbacks,
            progress=self.progress,
            keep=True,
            checkpoint=last_checkpoint(folder) if resume else None,
        )
        # the epochs from the history, so that an interrupted run counts whole
        rows = [row for row in run.history if row["stage"] == stage]
        metrics = {**cost_of(rows, self.data, schedule, before), "peak_memory_bytes": peak}
        return metrics | self.data.metrics(self.recipe.eval_batch_size, self.progress)

    def engines(self, heads: Sequence[Head] | None) -> tuple[dict[str, Engine], Worth]:
        """The engine that each stage of a new run would have, and what a prefix cache would save in step 2."""
        recipe, data, tokenizer = self.recipe, self.data, self.tokenizer
        tune = self._schedule(recipe.tune_lr, recipe.tune_epochs)
        stages = {"tune": tune}
        if heads is None:
            stages = {"select": self._schedule(recipe.select_lr, recipe.select_epochs), **stages}
            above = [p for p in self.projections if p.layer >= recipe.min_layer]
            heads = [(p.layer, head) for p in above for head in range(p.n_heads)]
        # the rules try a patched model
        handle = patch(self.model, LofitConfig(offset=heads))
        try:
            settled = {
                stage: settle_for(handle, self._usable(stage), data, tokenizer, schedule)[0]
                for stage, schedule in stages.items()
            }
            return settled, worth_of(handle, *data.reads(tune))
        finally:
            handle.unpatch()

    def _usable(self, stage: str) -> Engine:
        """Step 1 scales every layer, and leaves nothing below to keep."""
        return replace(self.engine, prefix_cache_gb=0.0) if stage == "select" else self.engine

    def _engine(self, handle: LofitHandle, run: RunFolder, stage: str, schedule: Schedule) -> Engine:
        """The settled engine: of the interrupted run where one has begun the stage, settled and kept otherwise."""
        usable = self._usable(stage)
        kept = run.engine(stage)
        if kept is None:
            engine, _ = settle_for(handle, usable, self.data, self.tokenizer, schedule)
            run.keep_engine(stage, asdict(engine))
            return engine
        # a run goes on as it began, whatever the rules say by now; how much disk it may take can be changed
        for name, value in asdict(self.asked).items():
            if name != "prefix_cache_gb" and value not in ("auto", kept[name]):
                raise ValueError(
                    f"{run.path} holds a run that was begun with {name}={kept[name]}, got {value}: choose another "
                    "folder, or start over with resume=False (--no-resume)"
                )
        disk = usable.prefix_cache_gb
        return Engine(**{**kept, "prefix_cache_gb": kept["prefix_cache_gb"] if disk == "auto" else disk})
