"""A program of a user's, for type checkers: `make types` reads it, nothing runs it."""

from pathlib import Path
from typing import assert_type

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import lofit_fast as lf
import lofit_kernels
from lofit_fast.evaluation.judge import Judgement
from lofit_fast.patching.verify import ExportReport
from lofit_fast.tasks.task import Task
from lofit_fast.training.two_steps import FitResult


def two_steps(model: nn.Module, folder: Path) -> None:
    """Heads are a list of pairs, wherever they come from and go."""
    handle = lf.patch(model, lf.LofitConfig(scale="all"))
    heads = lf.select_heads(lf.head_scores(handle), top=0.03)
    assert_type(heads, list[tuple[int, int]])
    handle.unpatch()
    tuned = lf.patch(model, lf.LofitConfig(offset=heads, positions="answer"))
    with tuned.disabled(), tuned.folded(), tuned.acting_on("all"):
        pass
    assert_type([parameter for parameter in tuned.parameters()], list[nn.Parameter])
    tuned.add("other", folder)
    tuned.set_active("other")
    with tuned.rows(["other", None]):
        pass
    assert_type(tuned.active, str | None)
    assert_type(tuned.adapters, tuple[str, ...])
    assert_type(tuned.save(folder), Path)
    assert_type(lf.load(model, folder), lf.LofitHandle)
    assert_type(lf.handle_of(model), lf.LofitHandle | None)
    assert_type(tuned.merge(), nn.Module)


def trained(task: Task, folder: Path) -> None:
    """From a name to a plain model."""
    model, tokenizer = lf.load_model("smollm2", dtype="float32", quantization=None)
    assert_type(model, nn.Module)
    assert_type(tokenizer, PreTrainedTokenizerBase)
    recipe = lf.Recipe.fast(top=4)
    result = lf.fit(model, tokenizer, task.train, recipe, output_dir=folder, engine=lf.Engine.fast(), heads=[(0, 1)])
    assert_type(result, FitResult)
    assert_type(lf.judge(model, tokenizer, task), Judgement)
    assert_type(lf.export(result.handle, folder / "plain"), Path)
    assert_type(lf.verify_export(result.handle, folder / "plain"), ExportReport)
    lf.AdapterCheckpoints(result.handle, save_base=False)


def an_op(z: Tensor, weight: Tensor, scale: Tensor) -> None:
    """The op by itself."""
    y = lofit_kernels.head_affine_linear(z, weight, scale=scale, scale_heads=[0, 2])
    assert_type(y, Tensor)
    assert_type(lofit_kernels.head_index([0, 2], 4), Tensor)
