"""What a run of LoFiT does, step by step, on one model, objective and recipe: `fit` is its front door."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import TrainerCallback

from lofit_fast import ranks
from lofit_fast.config import Head, LofitConfig, Recipe
from lofit_fast.data.one_answer import check_one_answer
from lofit_fast.extras import check_training
from lofit_fast.heads import select_heads
from lofit_fast.patching.architectures import find_projections
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patch import load, patch
from lofit_fast.patching.placement import dtype_of
from lofit_fast.patching.sharding import check_fittable
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.base_of_run import base_of
from lofit_fast.training.begun_with import as_begun, begun_with
from lofit_fast.training.choice.look import look
from lofit_fast.training.choice.ways import WAYS, Trained, Untrained
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.auto import said, with_prompts
from lofit_fast.training.finite_steps import Diverged
from lofit_fast.training.frozen_base import check_passes_gradients
from lofit_fast.training.kept_engine import begun_engine, check_begun, with_weights
from lofit_fast.training.kept_identity import kept_as_now
from lofit_fast.training.loss_sense import LossSense
from lofit_fast.training.objectives import Objective
from lofit_fast.training.prefix_cache.worth import Worth, worth_of
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.sharded_base import check_objective, without_shortcuts
from lofit_fast.training.shared_batches import check_shares
from lofit_fast.training.stage import cost_of, settle_for, train
from lofit_fast.training.stage_checkpoints import Checkpoint, last_whole
from lofit_fast.training.told_run import opened

# the one knob of the engine that changes results beyond rounding
_RESULTS = "frozen_products"
# what must be the same in all processes, as an error names it
_ALIKE = {"data": "training data", "eval_data": "evaluation data", "model": "model", "heads": "given heads"}
# knobs that any model takes
_FREE = ("group_by_length", "prefix_cache_gb", "large_pages", "verify")


@dataclass(frozen=True)
class FitResult:
    """What a run has produced.

    handle: of the model, patched with what was tuned. heads: (layer, head), best first. scores: (layers, heads),
    what they were chosen by (by default the scale norms of step 1), or None when the heads were given.
    history: a dict per epoch and stage; for a choice without training, one with seconds and no loss.
    metrics: per stage ("select", "tune"): seconds, tokens_per_s (real tokens, not padding), examples_per_s,
    peak_memory_bytes (above what was held before the stage; see `cost.peak_memory`), exact_match (of what was trained).
    """

    handle: LofitHandle
    heads: list[Head]
    scores: Tensor | None
    history: list[dict]
    metrics: dict[str, dict[str, float]]


class TwoSteps:
    """Everything the two steps share: the encoded data, the recipe, the way a step is trained and measured."""

    def __init__(self, model, tokenizer, objective: Objective, recipe: Recipe, engine: Engine, callbacks, progress):
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.callbacks, self.progress = callbacks, progress and ranks.first()
        check_training()
        check_fittable(model)
        check_passes_gradients(model)
        self.projections = find_projections(model)
        self.objective = objective
        self.data = objective.encoded(model, tokenizer, recipe.max_length, self.progress)
        if recipe.positions == "answer":
            check_one_answer(self.data.rows)
            # whose loss would be that of vectors which act on later prompts too
            check_one_answer(getattr(self.data, "judged_rows", ()), "evaluation example")
        check_objective(model, objective)
        engine = without_shortcuts(model, engine)
        self.asked, self.engine = engine, self.data.usable(engine, recipe.accumulation_steps)
        check_shares(model, recipe.batch_size, recipe.accumulation_steps, self.data.n_examples)
        self.way = WAYS[recipe.select]
        trained = [recipe.tune_epochs] + [recipe.select_epochs] * isinstance(self.way, Trained)
        if min(trained) < self.data.least_epochs:
            raise ValueError(
                f"training on {objective.name} takes at least {self.data.least_epochs} epoch in each step, got "
                f"select_epochs={recipe.select_epochs} and tune_epochs={recipe.tune_epochs}"
            )

    @cached_property
    def _base(self) -> dict[str, object]:
        """What tells the base. Of a model in parts all processes must ask at once, so it waits until all are ready."""
        return base_of(self.model, self.projections)

    def checked_heads(self, heads: Sequence[Head] | Literal["all"] | None) -> Sequence[Head] | None:
        """The given heads, "all" as a list. Fails before training, not after it, on heads that cannot be chosen."""
        top, lowest = self.recipe.top, self.recipe.min_layer
        total = sum(p.n_heads for p in self.projections if p.layer >= lowest)
        if not total:
            raise ValueError(f"min_layer is {lowest}, but the model's last layer is {self.projections[-1].layer}")
        if heads is None:
            if isinstance(top, int) and top > total:
                at = f" in layers from {lowest}" if lowest else ""
                raise ValueError(f"asked for the top {top} heads, but the model has {total}{at}")
        elif heads == "all":
            heads = self._every_head()
        else:
            below = [tuple(pair) for pair in LofitConfig(offset=heads).offset if pair[0] < lowest]
            if below:
                raise ValueError(f"min_layer is {lowest}, but the given heads are in layers below: {below}")
            LofitHandle(self.model, LofitConfig(offset=heads), self.projections)
        return heads

    def _every_head(self) -> list[Head]:
        """Of the layers that the recipe leaves."""
        return [(p.layer, h) for p in self.projections if p.layer >= self.recipe.min_layer for h in range(p.n_heads)]

    def identity(self, heads: Sequence[Head] | None) -> dict:
        """What makes two runs the same one."""
        # what few runs have is named by those alone
        special = {}
        for callback in self.callbacks:
            special |= getattr(callback, "identity", {})
        return special | {
            "objective": self.objective.name,
            "recipe": self.recipe.identity(),
            "model": self._base,
            "dtype": str(dtype_of(self.model)).removeprefix("torch."),
            **self.data.identity(),
            "heads": None if heads is None else [list(pair) for pair in heads],
            # of the engine's knobs the one that says which examples share a batch
            "group_by_length": self.engine.group_by_length,
        }

    @contextmanager
    def opened(self, output_dir: Path | str, heads: Sequence[Head] | None, resume: bool) -> Iterator[RunFolder]:
        """A scope with the run folder; raises as `RunFolder.open`, and ValueError for a stage with other products."""
        identity = self.identity(heads)
        self._check_alike(identity)
        with opened(output_dir, identity, resume, as_now=kept_as_now(identity, self.data.identity_before())) as run:
            # the one knob of the engine that changes results: a finished stage counts too
            for kept in filter(None, map(run.engine, ("select", "tune"))):
                check_begun(run.path, kept, self.asked, (_RESULTS,))
            yield run

    def _check_alike(self, identity: dict) -> None:
        """Raise ValueError in every process where one has other data, settings or weights than another."""
        if ranks.count() > 1:
            for name, value in {**identity, "recipe": asdict(self.recipe), "engine": asdict(self.asked)}.items():
                ranks.check_same(value, _ALIKE.get(name, name))

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
            ranks.by_first(lambda: handle.save(run.path / "select" / "adapter"))
            return way.score(handle), metrics
        finally:
            handle.unpatch()

    def look(self, way: Untrained, run: RunFolder | None) -> tuple[Tensor, dict]:
        """The scores of a look without training, and what it took. run: keeps the engine; None keeps nothing."""
        handle = patch(self.model, LofitConfig(scale="all", init_std=0.0, positions=self.recipe.positions))
        try:
            engine = self._look_engine(way, handle, run)
            begun = {} if run is None else run.made_with("select")
            with as_begun(begun, self.model, "select"):
                scores, metrics = look(way, handle, self.data, self.recipe, engine, self.progress)
        finally:
            handle.unpatch()
        # minus infinity is that of a head out of the running
        if scores.isnan().any() or scores.isposinf().any():
            raise FloatingPointError(
                "the gradients of step 1 are not finite, so no head can be chosen by them: look at the data and the "
                "base model, or try float32"
            )
        return scores, metrics

    def _look_engine(self, way: Untrained, handle: LofitHandle, run: RunFolder | None) -> Engine:
        """The settled engine of a look; one that changes nothing where nothing is looked at."""
        if not way.looks:
            return Engine()
        if run is None:
            # no training follows, for which the prompts of all examples would be kept
            engine = replace(self._settled(handle, "select"), prompt_cache_gb=0.0)
        else:
            engine = self._engine(handle, run, "select")
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
        # of several processes one trains it, and the others wait and read
        with opened(folder / digest, identity, resume=True, wait=True, mend=True) as shared:
            if shared.heads is None:
                self.select(shared, resume=True)
            run.adopt(shared, select_heads(shared.scores, self.recipe.top, self.recipe.min_layer))

    def tune(self, run: RunFolder, resume: bool) -> FitResult:
        """Step 2, from the base model; or its saved result when the run is done."""
        if run.stage == "done":
            # all is read before the model is touched
            kept = run.heads, run.scores, run.history, run.metrics
            return FitResult(self._finished(run), *kept)
        handle = patch(self.model, self.tuned_config(run.heads))
        try:
            return self.tuned(handle, run, resume)
        except BaseException:
            handle.unpatch()
            raise

    def tuned(self, handle: LofitHandle, run: RunFolder, resume: bool) -> FitResult:
        """Step 2 in a model that is patched: leaves the adapter in the run. handle: of what is trained."""
        schedule = replace(self._schedule(self.recipe.tune_lr, self.recipe.tune_epochs), l1=0.0)
        metrics = self._train(handle, run, "tune", schedule, resume)
        if not all(vectors.isfinite().all() for vectors in handle.parameters()):
            raise FloatingPointError("the tuned vectors are not finite: no adapter is saved")
        ranks.by_first(lambda: handle.save(run.path / "adapter"))
        run.record("tune", metrics)
        return FitResult(handle, run.heads, run.scores, run.history, run.metrics)

    def _finished(self, run: RunFolder) -> LofitHandle:
        """The model with a finished run's adapter. Raises ValueError, the model as it was, for a damaged one."""
        try:
            handle = load(self.model, run.path / "adapter")
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"the run in {run.path} is done, but its adapter is not whole: {error}. Start over with resume=False "
                "(--no-resume), or choose another folder"
            ) from error
        scaled, config, heads = self.recipe.tune_scales, handle.config, sorted(run.heads or ())
        if [sorted(config.offset or ()), sorted(config.scale or ())] != [heads, heads if scaled else []]:
            handle.unpatch()
            raise ValueError(
                f"the run in {run.path} is done, but its adapter is not {'scales and ' * scaled}offsets on the heads "
                f"that {run.path / 'heads.json'} names: start over with resume=False (--no-resume), or choose another "
                "folder"
            )
        return handle

    def tuned_config(self, heads: Sequence[Head]) -> LofitConfig:
        """What step 2 trains on its heads."""
        return self._config(offset=heads, scale=heads if self.recipe.tune_scales else None)

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
        sense = LossSense(stage, self.data.chance, schedule.epochs)

        def report(row: dict) -> None:
            run.append_history({"stage": stage, **row})
            epoch_1 = min((r for r in run.history if r["stage"] == stage), key=lambda r: r["epoch"])
            if ranks.first():
                sense.saw(row, epoch_1)

        try:
            with as_begun(run.made_with(stage), self.model, stage):
                before, peak = train(
                    handle,
                    self.data,
                    schedule,
                    engine,
                    folder=run.path / stage,
                    on_epoch=report,
                    callbacks=[*self.callbacks, *callbacks],
                    progress=self.progress,
                    keep=True,
                    checkpoint=self._checkpoint(run, stage) if resume else None,
                )
        except Diverged as error:
            where = {"step": error.step, "epoch": error.epoch, "examples": error.examples}
            with suppress(OSError):
                # all have it, with the same words
                run.note_divergence(stage, schedule.lr, **where)
            raise Diverged(f"{error}. Run it again with a lower {stage}_lr to go on from there", **where) from error
        # the epochs from the history, so that an interrupted run counts whole
        rows = [row for row in run.history if row["stage"] == stage]
        metrics = {**cost_of(rows, self.data, schedule, before), "peak_memory_bytes": peak}
        return metrics | self.data.metrics(self.recipe.eval_batch_size, self.progress)

    def _checkpoint(self, run: RunFolder, stage: str) -> Checkpoint | None:
        """The whole checkpoint that a stage goes on from; damaged ones are passed over, and that is said."""
        found, passed = ranks.told(lambda: last_whole(run.path / stage))
        if passed and ranks.first():
            then = "begins anew" if found is None else f"goes on from {found.path.name}"
            print(f"warning: {'; '.join(passed)}; the step {stage!r} {then}", file=sys.stderr)
        run.forget_after(stage, 0.0 if found is None else found.epoch)
        return found

    def engines(self, heads: Sequence[Head] | None) -> tuple[dict[str, Engine], Worth]:
        """The engine that each stage of a new run would have, and what a prefix cache would save in step 2."""
        with self._tried(heads) as (handle, stages):
            settled = {stage: self._settled(handle, stage) for stage in stages}
            tune = self._schedule(self.recipe.tune_lr, self.recipe.tune_epochs)
            return settled, worth_of(handle, *self.data.reads(tune))

    def check_asked(self, heads: Sequence[Head] | None) -> None:
        """Raise ValueError for a knob of the engine that was asked for and is not to be had here: "auto" always is."""
        asked = asdict(self.asked)
        if any(value not in ("auto", asdict(Engine())[name]) for name, value in asked.items() if name not in _FREE):
            with self._tried(heads) as (handle, stages):
                for stage in stages:
                    self._settled(handle, stage)

    @contextmanager
    def _tried(self, heads: Sequence[Head] | None) -> Iterator[tuple[LofitHandle, list[str]]]:
        """A scope with a patched model for the rules to try, and the stages that run something."""
        stages = ["tune"]
        if heads is None:
            # a way that does not look at the data runs nothing
            stages = ["select"] * getattr(self.way, "looks", True) + stages
            heads = self._every_head()
        handle = patch(self.model, self.tuned_config(heads))
        try:
            yield handle, stages
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
            run.keep_engine(stage, asdict(engine), begun_with(self.model))
            return engine
        engine = begun_engine(run.path, kept, self.asked, usable)
        return with_prompts(handle, with_weights(engine, self.asked, self.model, stage, self.progress))
