"""The two steps of LoFiT: learn scales on every head, keep the best heads, learn offsets on those. One driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from lofit_fast import ranks
from lofit_fast.config import GivenHeads, Head, Recipe
from lofit_fast.files import given_path, lasting_path
from lofit_fast.models.trials import remembering
from lofit_fast.patching.patched import handle_of
from lofit_fast.random_states import same_random_numbers
from lofit_fast.tasks.task import Preference
from lofit_fast.torch_defaults import with_gradients
from lofit_fast.training.choice.ways import WAYS, Untrained
from lofit_fast.training.engine import Engine
from lofit_fast.training.given_arguments import check_given, given_callbacks, given_heads
from lofit_fast.training.objectives import BETA, Completions, EncodedObjective, Examples, Objective, Preferences
from lofit_fast.training.prefix_cache.worth import Worth
from lofit_fast.training.run_clearing import STATE
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.run_source import Source
from lofit_fast.training.sharded_base import sharded_as_asked
from lofit_fast.training.shared_batches import check_places
from lofit_fast.training.told_run import quiet_unless_first
from lofit_fast.training.two_steps import FitResult, TwoSteps


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    eval_data: Examples | None = None,
    heads: GivenHeads = None,
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
        heads: skip step 1 and tune these; "all": every head of the layers that the recipe's min_layer leaves.
        step1_dir: a folder that runs share: step 1 is taken from there when one of the same settings, model and data
            has left it, and trained there otherwise.
        callbacks: a list of transformers' TrainerCallback, for each step that trains. In a run of several processes
            each has them, and what a callback asks of one process all of them do.
        resume: whether to go on with the run in the folder.
        progress: whether bars and the engine's choice are shown.

    Raises:
        TypeError: what is no model, tokenizer, Recipe, Engine, callback or path.
        ValueError: empty data, an example without labels or too long, a folder with another run in it, more heads than
            there are, a model sharded in a way that is not known, a quantized one that cannot be trained through.
        OSError: a folder that cannot be written; BlockingIOError, naming it, where another process trains in it.
        FloatingPointError: a loss, a gradient or a vector is not finite. It names the step, its examples and the last
            good checkpoint. The run goes on from there with another learning rate of the step that diverged.
        ImportError: accelerate is not installed, which transformers trains with.

    After an error the model is as it was, and the folder holds whole files only.

    Called by each process that torchrun or accelerate has started, it trains data-parallel: the recipe's batch size is
    that of all processes together, and the result is that of one process with it, which every process returns. The
    first one writes and shows what one process would. A tensor-parallel model, which all of them hold together, is
    trained by each with whole batches, to the same result.
    """
    how = {"engine": engine, "heads": heads, "step1_dir": step1_dir, "callbacks": callbacks}
    objective = Completions(train, () if eval_data is None else eval_data)
    return fit_objective(
        model, tokenizer, objective, recipe, output_dir=output_dir, resume=resume, progress=progress, **how
    )


def fit_preferences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    preferences: Sequence[Preference | Mapping[str, object]],
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    heads: GivenHeads = None,
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


@with_gradients
@same_random_numbers()
def fit_objective(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    recipe: Recipe | None = None,
    *,
    output_dir: Path | str,
    engine: Engine | None = None,
    heads: GivenHeads = None,
    step1_dir: Path | str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    progress: bool = True,
    source: Source | None = None,
) -> FitResult:
    """Both steps on any objective; see `fit`. source: where the data came from, for the run to keep."""
    check_given(model, tokenizer, recipe, engine)
    callbacks, heads, output_dir = given_callbacks(callbacks), given_heads(heads), given_path(output_dir)
    step1_dir = None if step1_dir is None else given_path(step1_dir)
    # what the data's encoding has tried, step 1 knows, and step 2
    with ranks.joined("training"), quiet_unless_first(), sharded_as_asked(model), remembering():
        how = {"heads": heads, "step1_dir": step1_dir, "resume": resume, "source": source}
        made = (model, tokenizer, objective, recipe or Recipe(), engine or Engine(), callbacks, progress)
        return _both_steps(*made, output_dir=output_dir, **how)


def _both_steps(
    model: nn.Module,
    *made: Any,
    output_dir: Path | str,
    heads: GivenHeads,
    step1_dir: Path | str | None,
    resume: bool,
    source: Source | None,
) -> FitResult:
    _check_unpatched(model)
    ranks.check_same({"output_dir": str(output_dir), "step1_dir": str(step1_dir), "resume": resume}, "arguments")
    # a callback may go elsewhere
    output_dir, step1_dir = lasting_path(output_dir), None if step1_dir is None else lasting_path(step1_dir)
    steps = _steps(model, *made)
    heads = steps.checked_heads(heads)
    result = None
    try:
        with opened_run(steps, output_dir, heads, resume) as run:
            run.keep_source(source)
            if run.stage != "done":
                choose_heads(steps, run, heads, step1_dir, resume)
            result = steps.tune(run, resume)
    except BaseException:
        # letting go of the folder may fail too
        if result is not None:
            result.handle.unpatch()
        raise
    return result


def choose_heads(
    steps: TwoSteps, run: RunFolder, heads: Sequence[Head] | None, step1_dir: Path | str | None, resume: bool
) -> None:
    """Step 1, from wherever it comes: afterwards the run has its heads."""
    if run.heads is None and heads is not None:
        run.write_heads(heads, None)
    elif run.heads is None and step1_dir is not None:
        steps.adopt(run, Path(step1_dir))
    elif run.heads is None:
        steps.select(run, resume)


@contextmanager
def opened_run(
    steps: TwoSteps, output_dir: Path | str, heads: Sequence[Head] | None, resume: bool
) -> Iterator[RunFolder]:
    """The scope of `TwoSteps.opened`. What a new run is asked for and cannot have is refused before it has a folder."""
    if not (resume and ranks.told(lambda: (Path(output_dir) / STATE).exists())):
        steps.check_asked(heads)
    with steps.opened(output_dir, heads, resume) as run:
        yield run


@with_gradients
@same_random_numbers()
def rehearse(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    recipe: Recipe | None = None,
    *,
    engine: Engine | None = None,
    heads: GivenHeads = None,
    progress: bool = True,
) -> tuple[EncodedObjective, dict[str, Engine], Worth]:
    """All that `fit_objective` does before it opens the run folder, and nothing after: (the data, stage -> engine).

    And what a prefix cache would save in step 2: of the given heads, or if step 1 kept all that the recipe lets it.

    Everything that can be refused before training is refused here, with the same sentences. Nothing is changed or
    written; the engines are settled, as a new run's would be. Arguments and errors are those of `fit`.
    """
    check_given(model, tokenizer, recipe, engine)
    heads = given_heads(heads)
    _check_unpatched(model)
    with remembering():
        steps = TwoSteps(model, tokenizer, objective, recipe or Recipe(), engine or Engine(), (), progress)
        return steps.data, *steps.engines(steps.checked_heads(heads))


@with_gradients
@same_random_numbers()
def select_by_training(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
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
    check_given(model, tokenizer, recipe, engine)
    callbacks, output_dir = given_callbacks(callbacks), lasting_path(output_dir)
    with ranks.joined("choosing heads"), quiet_unless_first():
        steps = _steps(model, tokenizer, objective, recipe or Recipe(), engine or Engine(), callbacks, progress)
        steps.checked_heads(None)
        with steps.opened(output_dir, None, resume) as run:
            if run.heads is None:
                steps.select(run, resume)
    # the others see it too
    return RunFolder(run.path)


@with_gradients
@same_random_numbers()
def select_untrained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
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
    with ranks.joined("choosing heads"), quiet_unless_first():
        steps = _steps(model, tokenizer, objective, recipe, engine or Engine(), (), progress)
        steps.checked_heads(None)
        return steps.look(way, None)


def _steps(*made: Any) -> TwoSteps:
    """What the two steps share; where one process cannot make it, none of them goes on."""
    with ranks.together("reading the data"):
        steps = TwoSteps(*made)
    check_places(steps.model)
    return steps


def _check_unpatched(model: nn.Module) -> None:
    if handle_of(model) is not None:
        raise ValueError("the model is already patched: unpatch() its handle before fit")
