"""Several runs of a sweep at once: step 2 of all of them in one forward and backward pass, and all else as ever.

Each run has its own run folder, data, optimizer, schedule, clipping and checkpoints, and its own adapter on its rows of
a joint batch. What a run leaves is what it leaves by itself, up to rounding: it may go on together or alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from lofit_fast.config import LofitConfig
from lofit_fast.data.encode import pad_token_id
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.models.trials import remembering, said_of
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patch import patch
from lofit_fast.training.begun_with import begun_with
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.auto import said
from lofit_fast.training.fit import choose_heads, opened_run
from lofit_fast.training.objectives import objective_of
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.stage import settle_for
from lofit_fast.training.sweep.grid import Grid, Run
from lofit_fast.training.sweep.one_run import Runner, has_ended
from lofit_fast.training.sweep.sweep_folder import RUNS
from lofit_fast.training.sweep.together_checks import check_no_dropout, check_plain_loss, check_rows_apart
from lofit_fast.training.sweep.together_step import JointStep, MemberData, MemberHandle, MemberModel
from lofit_fast.training.sweep.together_turns import Ask, Turn
from lofit_fast.training.trainer import undisturbed
from lofit_fast.training.two_steps import FitResult, TwoSteps

# what trainings that share a pass cannot have -> what they have instead; "auto" is taken for that
_INSTEAD: dict[str, object] = {
    "compile": False,
    "packing": False,
    "narrow": False,
    "frozen_products": "full",
    "prefix_cache_gb": 0.0,
    "prompt_cache_gb": 0.0,
    "verify": False,
}
_OWN = "nobody's"


def joint_engine(asked: Engine) -> Engine:
    """The engine of a joint step. Raises ValueError for what was asked for and is not to be had there."""
    return asked.with_plain(_INSTEAD, "runs that are trained together (together above 1) cannot have it")


def check_together(grid: Grid, together: int, jobs: int) -> None:
    """Raise ValueError for what cannot be trained together, before anything is loaded."""
    if isinstance(together, bool) or not isinstance(together, int) or together < 1:
        raise ValueError(f"expected together to be a whole number from 1, got {together!r}")
    if together > 1 and jobs > 1:
        raise ValueError(
            f"got together={together} and jobs={jobs}: runs that share a pass share a process, expected one"
        )
    if together > 1:
        joint_engine(grid.engine)
        if scaled := [run.name for run in grid.runs if run.recipe.tune_scales]:
            raise ValueError(
                "runs with tune_scales cannot be trained together, since the rows of a batch share the model's scales: "
                f"expected together=1, or no tune_scales, got it in {len(scaled)} of {len(grid.runs)} runs "
                f"({scaled[0]})"
            )


class MemberSteps(TwoSteps):
    """The steps of one run, the second of them with others."""

    joint: Engine

    def settled_with(self, handle: LofitHandle) -> Engine:
        """The engine of the joint steps, by the rules for this run's data."""
        schedule = self._schedule(self.recipe.tune_lr, self.recipe.tune_epochs)
        return settle_for(handle, joint_engine(self.asked), self.data, self.tokenizer, schedule)[0]

    def _engine(self, handle: LofitHandle, run: RunFolder, stage: str) -> Engine:
        if not isinstance(handle, MemberHandle):
            return super()._engine(handle, run, stage)
        if run.engine(stage) is None:
            run.keep_engine(stage, asdict(self.joint), begun_with(self.model))
        # the model is prepared already: what is left to this run is its order of examples
        return Engine(group_by_length=self.joint.group_by_length)


@dataclass
class _Member:
    """A run that is being trained. folder: opened for it alone."""

    name: str
    run: Run
    steps: MemberSteps
    folder: RunFolder

    def passes(self) -> int:
        """Forward passes of its second step."""
        recipe = self.run.recipe
        examples = recipe.batch_size // recipe.accumulation_steps
        return recipe.tune_epochs * math.ceil(self.steps.data.n_examples / examples)


class TogetherRunner(Runner):
    """run -> row, as `Runner`, of several runs at a time. grid, folder, base, options: as there.

    Raises ValueError for a task of preferences too, a model with dropout or a loss of its own, and one of whose rows
    one changes another.
    """

    def __init__(self, grid: Grid, folder: Path, base: tuple[nn.Module, object] | None = None, **options) -> None:
        super().__init__(grid, folder, base, **options)
        self.joint = joint_engine(grid.engine)
        if any(task.preferences for task in self._tasks.values()):
            raise ValueError("runs on preferences cannot be trained together: expected together=1")
        check_no_dropout(self.model)
        check_plain_loss(self.model)
        check_rows_apart(self.model, pad_token_id(self.tokenizer))
        self._found: dict[str, FitResult | Exception] = {}
        self._resume: dict[str, bool] = {}

    def train(self, runs: Sequence[tuple[Run, bool]]) -> None:
        """Train runs, so that each has its row when it is called. With each: whether it goes on with what is there.

        All of their vectors act on the same positions.
        """
        self._resume = {run.name: resume for run, resume in runs}
        self._train([run for run, resume in runs if not (resume and has_ended(self.folder / RUNS / run.name))])

    def _trained(self, run: Run, folder: Path, *rest) -> dict[str, object]:
        found = self._found.pop(run.name, None)
        if found is None:
            return super()._trained(run, folder, *rest)
        if isinstance(found, Exception):
            raise found
        return self._summary(folder, found, run, found.metrics["tune"]["seconds"])

    def _train(self, runs: Sequence[Run]) -> None:
        """Train runs, and leave what comes of each in `_found`."""
        with remembering(), ExitStack() as folders:
            members = []
            for run in runs:
                try:
                    members.append(self._begun(run, len(members), folders))
                # who has the folder may be about to go: alone it waits for that
                except BlockingIOError:
                    continue
                except Exception as error:
                    self._found[run.name] = error
            fresh = [member for member in members if member.folder.stage != "done"]
            if fresh:
                with _patched(self.model, fresh) as handle:
                    self._tune(handle, fresh)

    def _begun(self, run: Run, number: int, folders: ExitStack) -> _Member:
        """A run whose heads are chosen: step 1 is trained by itself, or taken from the runs that share it."""
        options, objective = self.options, objective_of(self._tasks[run.train_size])
        progress = options.get("progress", True)
        steps = MemberSteps(self.model, self.tokenizer, objective, run.recipe, self.grid.engine, (), progress)
        heads = steps.checked_heads(run.heads)
        resume = self._resume[run.name]
        path = self.folder / RUNS / run.name
        folder = folders.enter_context(opened_run(steps, path, heads, resume))
        folder.keep_source(self.source(run))
        if folder.stage != "done":
            choose_heads(steps, folder, heads, options["step1_dir"], resume)
        return _Member(f"run {number}", run, steps, folder)

    def _tune(self, handle: LofitHandle, members: Sequence[_Member]) -> None:
        """Step 2 of all, in turns between joint steps."""
        engine = members[0].steps.settled_with(handle)
        if self.options.get("progress", True):
            print(f"{len(members)} runs together; {said(engine)}", file=sys.stderr)
        logits = logit_rows(self.model, SCOPED)
        joint = JointStep(handle, pad_token_id(self.tokenizer), logits)
        for member in members:
            member.steps.joint = engine
            member.steps.data = MemberData(member.steps.data, logits)
        turns = {member.name: Turn(self._training(handle, member)) for member in members}
        failed: list[Turn] = []
        how = {
            "desc": f"{len(members)} runs together",
            "leave": False,
            "disable": not self.options.get("progress", True),
        }
        try:
            with (
                undisturbed(self.model),
                selecting_rows(self.model),
                prepared(self.model, engine),
                tqdm(total=max(member.passes() for member in members), **how) as bar,
            ):
                self.model.train()
                going = [turn for turn in turns.values() if turn.go_on()]
                while going:
                    try:
                        answers = joint([turn.asked for turn in going])
                    # what they cannot have together, memory above all, each may have alone
                    except Exception as error:
                        failed = [turn for turn in turns.values() if not turn.over]
                        print(
                            f"warning: {len(failed)} runs cannot go on together ({said_of(error)}): each is trained by "
                            "itself",
                            file=sys.stderr,
                        )
                        break
                    going = [turn for turn, answer in zip(going, answers, strict=True) if turn.go_on(answer)]
                    bar.update()
        finally:
            for turn in turns.values():
                turn.stop()
        for member in members:
            turn = turns[member.name]
            if turn in failed:
                continue
            if turn.error is not None and not isinstance(turn.error, Exception):
                raise turn.error
            self._found[member.run.name] = turn.result if turn.error is None else turn.error

    def _training(self, handle: LofitHandle, member: _Member):
        """The call that takes its turns: step 2 of one run, as it is by itself."""

        def train(ask: Ask) -> FitResult:
            handle.set_active(member.name)
            shared = MemberHandle(handle, member.name, self.model)
            view = MemberModel(self.model, member.name, list(shared.parameters()), ask)
            seen = MemberHandle(handle, member.name, view)
            result = member.steps.tuned(seen, member.folder, self._resume[member.run.name])
            return replace(result, handle=shared)

        return train


@contextmanager
def _patched(model: nn.Module, members: Sequence[_Member]) -> Iterator[LofitHandle]:
    """A scope with an adapter for each member in the model."""
    configs = [member.steps.tuned_config(member.folder.heads) for member in members]
    first = configs[0]
    # the handle's own is nobody's, and of zeros
    handle = patch(model, LofitConfig(offset=first.offset[:1], init_std=0.0, positions=first.positions), name=_OWN)
    try:
        for member, config in zip(members, configs, strict=True):
            handle.add(member.name, config)
        yield handle
    finally:
        handle.unpatch()
