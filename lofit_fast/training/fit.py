"""The two steps of LoFiT: learn scales on every head, keep the best heads, learn offsets on those. One driver."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn
from transformers import TrainerCallback

from lofit_fast.config import Head, LofitConfig, Recipe
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.extras import check_training
from lofit_fast.heads import select_heads
from lofit_fast.models.trials import remembering
from lofit_fast.patching.architectures import find_projections, fingerprint
from lofit_fast.patching.handle import LofitHandle, handle_of, load, patch
from lofit_fast.patching.placement import dtype_of
from lofit_fast.patching.sharding import check_unsharded
from lofit_fast.tasks.task import Preference
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.choice.look import look
from lofit_fast.training.choice.ways import WAYS, Trained, Untrained
from lofit_fast.training.engine import ON_DISK, Engine
from lofit_fast.training.engine.auto import said, with_prompts
from lofit_fast.training.frozen_base import check_passes_gradients
from lofit_fast.training.objectives import BETA, Completions, EncodedObjective, Examples, Objective, Preferences
from lofit_fast.training.prefix_cache.worth import Worth, worth_of
from lofit_fast.training.run_folder import RunFolder, last_checkpoint, weights_digest
from lofit_fast.training.stage import cost_of, settle_for, train

# the one that changes results beyond rounding
_RESULTS = "frozen_products"


@dataclass(frozen=True)
class FitResult:
    """What a run has produced.

    handle: of the model, patched with the tuned offsets. heads: (layer, head), best first. scores: (layers, heads),
    what they were chosen by (by default the scale norms of step 1), or None when the heads were given.
    history: a dict per epoch and stage; of a choice without training one that has seconds and no loss.
    metrics: per stage ("select", "tune"): seconds, tokens_per_s (real tokens, not padding), examples_per_s,
    peak_memory_bytes (above what was held before the stage; see `cost.peak_memory`), exact_match (of what was trained).
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
        callbacks: of transformers' Trainer, for what is trained of both steps.
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
    run = steps.opened(output_dir, heads, resume)
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
    engine: Engine | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    progress: bool = True,
) -> RunFolder:
    """Step 1 alone: the run folder, with `heads`, `scores` and `metrics["select"]`; the model is as it was.

    Arguments and errors are those of `fit`, which goes on with step 2 in such a folder.
    """
    steps = _TwoSteps(model, tokenizer, objective, recipe or Recipe(), engine or Engine(), callbacks, progress)
    steps.check_heads(None)
    run = steps.opened(output_dir, None, resume)
    if run.heads is None:
        steps.select(run, resume)
    return run


def select_untrained(
    model: nn.Module,
    tokenizer,
    objective: Objective,
    recipe: Recipe,
    *,
    engine: Engine | None = None,
    progress: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """The scores that step 1 would have, and what they took, where the recipe's way trains nothing: no folder needed.

    Raises ValueError for a way that trains, and what `fit` raises before its first step. The model is as it was.
    """
    way = WAYS[recipe.select]
    if not isinstance(way, Untrained):
        raise ValueError(f"select={recipe.select!r} is trained in a folder: use select_by_training")
    steps = _TwoSteps(model, tokenizer, objective, recipe, engine or Engine(), (), progress)
    steps.check_heads(None)
    return steps.look(way, None)


def _check_unpatched(model: nn.Module) -> None:
    if handle_of(model) is not None:
        raise ValueError("the model is already patched: unpatch() its handle before fit")


def check_one_answer(rows: Sequence[Encoded]) -> None:
    """Raise ValueError for an example that goes on with prompt after an answer, which vectors for answers leave alone.

    Of several answers each has a prompt of its own, the answers before included: one row has room for one of them.
    """
    for number, row in enumerate(rows, start=1):
        learned = [label != IGNORED for label in row["labels"]]
        begins = sum(here and not before for before, here in pairwise([False, *learned]))
        if begins > 1:
            raise ValueError(
                f"example {number} has {begins} answers, expected 1 for vectors that act on answers alone "
                "(positions='answer'): learn the last turn of each conversation (train_on='last', --train-on last)"
            )


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
        if recipe.positions == "answer":
            check_one_answer(self.data.rows)
        self.asked, self.engine = engine, self.data.usable(engine, recipe.accumulation_steps)
        self.way = WAYS[recipe.select]
        trained = [recipe.tune_epochs] + [recipe.select_epochs] * isinstance(self.way, Trained)
        if min(trained) < self.data.least_epochs:
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

    def identity(self, heads: Sequence[Head] | None) -> dict:
        """What makes two runs the same one."""
        # what few runs have is named by those alone
        special = {}
        for callback in self.callbacks:
            special |= getattr(callback, "identity", {})
        return special | {
            "objective": self.objective.name,
            "recipe": self.recipe.identity(),
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

    def opened(self, output_dir: Path | str, heads: Sequence[Head] | None, resume: bool) -> RunFolder:
        """The run folder; raises ValueError as `RunFolder.open`, and where a stage of it has other products."""
        run = RunFolder.open(output_dir, self.identity(heads), resume)
        # the one knob of the engine that changes results: a finished stage counts too
        for kept in filter(None, map(run.engine, ("select", "tune"))):
            self._check_begun(run, kept, (_RESULTS,))
        return run

    def _check_begun(self, run: RunFolder, kept: Mapping[str, object], names: Iterable[str]) -> None:
        """Raise ValueError for a knob that is asked for otherwise than a stage was begun with."""
        # a run of an earlier release lacks later knobs, and did what they do by default
        kept = {**asdict(Engine()), **kept}
        for name in names:
            if (value := getattr(self.asked, name)) not in ("auto", kept[name]):
                raise ValueError(
                    f"{run.path} holds a run that was begun with {name}={kept[name]}, got {value}: choose another "
                    "folder, or start over with resume=False (--no-resume)"
                )

    def select(self, run: RunFolder, resume: bool) -> None:
        """Step 1: leaves the heads and their scores in the run, and the model as it was."""
        recipe, way = self.recipe, self.way
        if isinstance(way, Trained):
            scores, metrics = self._trained(way, run, resume)
        else:
            scores, metrics = self.look(way, run)
            run.append_history({"stage": "select", "epoch": 1, **metrics})
        run.record("select", metrics)
        run.write_heads(select_heads(scores, recipe.top, recipe.min_layer), scores, recipe.select)

    def _trained(self, way: Trained, run: RunFolder, resume: bool) -> tuple[Tensor, dict]:
        """The scores of vectors trained on every head, and what they took."""
        recipe = self.recipe
        handle = patch(self.model, self._config(**{way.component: "all"}))
        try:
            schedule, ends = self._schedule(recipe.select_lr, recipe.select_epochs), way.callbacks(recipe)
            metrics = self._train(handle, run, "select", schedule, resume, ends)
            handle.save(run.path / "select" / "adapter")
            return way.score(handle), metrics
        finally:
            handle.unpatch()

    def look(self, way: Untrained, run: RunFolder | None) -> tuple[Tensor, dict]:
        """The scores of a look without training, and what it took. run: keeps the engine; None keeps nothing."""
        handle = patch(self.model, LofitConfig(scale="all", init_std=0.0, positions=self.recipe.positions))
        try:
            engine = self._look_engine(way, handle, run)
            return look(way, handle, self.data, self.recipe, engine, self.progress)
        finally:
            handle.unpatch()

    def _look_engine(self, way: Untrained, handle: LofitHandle, run: RunFolder | None) -> Engine:
        """The settled engine of a look; one that changes nothing where nothing is looked at."""
        if not way.looks:
            return Engine()
        engine = self._settled(handle, "select") if run is None else self._engine(handle, run, "select")
        if self.progress:
            print(said(engine), file=sys.stderr)
        return engine

    def adopt(self, run: RunFolder, folder: Path) -> None:
        """Step 1 from the one that runs of the same settings share, trained there first if none has."""
        identity = self.identity(None) | {"recipe": self.recipe.of_step1()}
        # scores in 8 bits are others; a way that runs nothing has none
        if (products := getattr(self.asked, _RESULTS)) != "full" and getattr(self.way, "looks", True):
            identity[_RESULTS] = products
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
        shared = ("init_std", "seed", "positions")
        return LofitConfig(**{name: getattr(self.recipe, name) for name in shared}, **heads)

    def _schedule(self, lr: float, epochs: int) -> Schedule:
        shared = ("batch_size", "accumulation_steps", "l1", "max_grad_norm", "seed", "max_length", "eval_batch_size")
        return Schedule(lr, epochs, **{name: getattr(self.recipe, name) for name in shared})

    def _train(
        self,
        handle: LofitHandle,
        run: RunFolder,
        stage: str,
        schedule: Schedule,
        resume: bool,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> dict:
        engine = self._engine(handle, run, stage)
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
            callbacks=[*self.callbacks, *callbacks],
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
        stages = ["tune"]
        if heads is None:
            # a way that does not look at the data runs nothing
            stages = ["select"] * getattr(self.way, "looks", True) + stages
            above = [p for p in self.projections if p.layer >= self.recipe.min_layer]
            heads = [(p.layer, head) for p in above for head in range(p.n_heads)]
        # the rules try a patched model
        handle = patch(self.model, self._config(offset=heads))
        try:
            settled = {stage: self._settled(handle, stage) for stage in stages}
            tune = self._schedule(self.recipe.tune_lr, self.recipe.tune_epochs)
            return settled, worth_of(handle, *self.data.reads(tune))
        finally:
            handle.unpatch()

    def _settled(self, handle: LofitHandle, stage: str) -> Engine:
        """The engine that the rules give a stage for the work that it is."""
        recipe, rows = self.recipe, None
        epochs = {"select": recipe.select_epochs, "tune": recipe.tune_epochs}[stage]
        if stage == "select" and not isinstance(self.way, Trained):
            epochs, rows = 1, self.data.looked_at(recipe)
        schedule = self._schedule(recipe.tune_lr, epochs)
        return settle_for(handle, self._usable(stage), self.data, self.tokenizer, schedule, rows)[0]

    def _usable(self, stage: str) -> Engine:
        """Step 1 scales every layer, and leaves nothing below to keep."""
        return replace(self.engine, prefix_cache_gb=0.0) if stage == "select" else self.engine

    def _engine(self, handle: LofitHandle, run: RunFolder, stage: str) -> Engine:
        """The settled engine: of the interrupted run where one has begun the stage, settled and kept otherwise."""
        usable = self._usable(stage)
        kept = run.engine(stage)
        if kept is None:
            engine = self._settled(handle, stage)
            run.keep_engine(stage, asdict(engine))
            return engine
        # a run goes on as it began, whatever the rules say by now; how much disk it may take can be changed
        self._check_begun(run, kept, (name for name in asdict(Engine()) if name not in ON_DISK))
        asked = {name: getattr(usable, name) for name in ON_DISK}
        return with_prompts(handle, Engine(**kept | {name: gb for name, gb in asked.items() if gb != "auto"}))
