"""What is damaged: a folder made whole, and a reading of it that gives something to compare.

A reading either refuses with a ValueError, TypeError or OSError, or gives what the undamaged folder gives. Files that
people write (heads, sweeps, data, a base) may say anything: what stands there is read, or refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import lofit_fast as lf
from benchmarks.proof.reliability.killed_works import autotune_paths, convert_gguf
from benchmarks.proof.reliability.tiny_base import (
    EXAMPLES,
    LAST_HEADS,
    PREFERENCES,
    character_tokenizer,
    filled_vectors,
    save_base,
    tiny_base,
    token_batch,
)
from lofit_fast.heads import read_heads

# the sum of two results that only the order of sums tells apart
_ROUNDING = 1e-3
_RECIPE = lf.Recipe(top=2, select_epochs=1, tune_epochs=2, batch_size=4)
_SWEEP = """\
[base]
model = "smollm2"
task = "completion"
data = "data.jsonl"
top = 0.1
batch_size = 4
[grid]
seed = [1, 2]
tune_lr = [1e-2, 2e-2]
[[runs]]
name = "mine"
select = "saliency"
select_examples = 3
"""


@dataclass(frozen=True)
class Damaged:
    """make: the folder, whole. read: what it gives. names: of the files that are damaged, as a pattern of `rglob`.

    share: of 10,000 trials. free: whether any reading is right, since the file may say anything.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    names: Sequence[str]
    share: int
    free: bool = False


@cache
def base_model() -> nn.Module:
    """The one model of this process, which every reading leaves as it was."""
    return tiny_base()


@cache
def _tokenizer():
    return character_tokenizer()


def _vectors(handle: lf.LofitHandle) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach().clone()) for name, parameter in handle.named_parameters()]


def _make_adapter(folder: Path) -> None:
    config = lf.LofitConfig(scale=[(0, 0), (1, 2)], offset=[(0, 1), (1, 2), (2, 3)])
    handle = filled_vectors(lf.patch(base_model(), config))
    handle.save(folder / "adapter")
    handle.unpatch()


def _read_adapter(folder: Path) -> object:
    handle = lf.load(base_model(), folder / "adapter")
    try:
        return handle.config.scale, handle.config.offset, handle.config.positions, _vectors(handle)
    finally:
        handle.unpatch()


class Stopped(Exception):
    """What ends a run in its midst."""


class _StopsInTune(TrainerCallback):
    """Ends step 2 before its second epoch."""

    def on_epoch_begin(self, args, state, control, **_):
        if Path(args.output_dir).name == "tune" and state.global_step:
            raise Stopped


def _fit(folder: Path, **options) -> object:
    how = {"output_dir": folder / "run", "progress": False, "callbacks": ()} | options
    recipe = how.pop("recipe", _RECIPE)
    result = lf.fit(base_model(), _tokenizer(), EXAMPLES, recipe, **how)
    try:
        return sorted(result.heads), _vectors(result.handle)
    finally:
        result.handle.unpatch()


def _make_cut_run(folder: Path) -> None:
    try:
        _fit(folder, callbacks=[_StopsInTune()])
    except Stopped:
        return
    raise RuntimeError("the run was not stopped")


def _fit_with_prefix(folder: Path) -> object:
    return _near(_fit(folder, heads=LAST_HEADS, resume=False, engine=lf.Engine(prefix_cache_gb=0.1)))


def _fit_with_prompts(folder: Path) -> object:
    recipe = lf.Recipe(tune_epochs=1, batch_size=4, positions="answer")
    engine = lf.Engine(prompt_cache_gb=0.1)
    return _near(_fit(folder, heads=LAST_HEADS, resume=False, recipe=recipe, engine=engine))


def _near(found: tuple) -> object:
    """Results of a run that may have gone on without its cache."""
    heads, vectors = found
    return heads, [(name, Near(vector)) for name, vector in vectors]


class Near:
    """Numbers that equal others to rounding."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Near) or other.numbers.shape != self.numbers.shape:
            return False
        away = (self.numbers - other.numbers).abs().max()
        return bool(away <= _ROUNDING * self.numbers.abs().max())

    __hash__ = None


def _make_heads(folder: Path) -> None:
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "heads.json").write_text(json.dumps({"heads": [[0, 1], [2, 3], [1, 0]], "scores": scores}))


def _read_heads(folder: Path) -> None:
    heads = lf.LofitConfig(offset=read_heads(folder / "heads.json")).offset
    # editors on Windows put a mark before UTF-8
    stands = json.loads((folder / "heads.json").read_text(encoding="utf-8-sig"))
    stands = stands["heads"] if isinstance(stands, dict) else stands
    if [list(pair) for pair in heads] != stands:
        raise AssertionError(f"other heads are read than stand there: {heads}")


def _make_answers(folder: Path) -> None:
    autotune_paths(folder)


def _use_answers(folder: Path) -> object:
    from lofit_kernels import head_affine_linear
    from lofit_kernels.answers import read_answers
    from lofit_kernels.dispatch import use_answers

    draw = torch.Generator().manual_seed(0)
    z, weight, scale = (torch.randn(size, generator=draw) for size in ((16, 64), (32, 64), (4, 16)))
    try:
        use_answers("cpu", read_answers("cpu"))
        return Near(head_affine_linear(z, weight, scale=scale))
    finally:
        use_answers("cpu", {})


def _make_sweep(folder: Path) -> None:
    (folder / "sweep.toml").write_text(_SWEEP)


def _read_sweep(folder: Path) -> None:
    from lofit_fast.training.sweep.grid import read_grid

    runs = folder / "runs"
    for run in read_grid(folder / "sweep.toml").runs:
        place = Path(os.path.normpath(runs / run.name))
        if place.parent != runs or len(run.name.encode()) > 255:
            raise AssertionError(f"a run called {run.name!r} is no folder of its own in runs/")


def _make_data(folder: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in EXAMPLES)
    (folder / "data.jsonl").write_text(rows)
    (folder / "data.json").write_text(json.dumps(EXAMPLES, indent=1))
    (folder / "data.csv").write_text("".join(f"{r['prompt']},{r['completion']}\n" for r in [_COLUMNS, *EXAMPLES]))
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PREFERENCES))


_COLUMNS = {"prompt": "prompt", "completion": "completion"}


def _read_data(folder: Path) -> None:
    from lofit_fast.tasks import load_task
    from lofit_fast.training.objectives import objective_of

    refused = []
    for name in ("data.jsonl", "data.json", "data.csv", "preferences.jsonl"):
        # one of them is damaged; what is said of it is judged, after the others were read
        try:
            task = load_task("completion", folder / name, _tokenizer())
            objective_of(task).encoded(base_model(), _tokenizer(), None)
        except (ValueError, TypeError, OSError) as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _load_converted(folder: Path) -> object:
    return convert_gguf(folder)(token_batch()).logits.detach()


def _load_base(folder: Path) -> None:
    from lofit_fast.models.load import load_model

    load_model(str(folder / "base"), dtype="float32", device="cpu")


DAMAGED: dict[str, Damaged] = {
    "adapter": Damaged(_make_adapter, _read_adapter, ("adapter/*",), 6200),
    "heads": Damaged(_make_heads, _read_heads, ("heads.json",), 1000, free=True),
    "sweep file": Damaged(_make_sweep, _read_sweep, ("sweep.toml",), 800, free=True),
    "data": Damaged(_make_data, _read_data, ("data.*", "preferences.jsonl"), 700, free=True),
    "autotune": Damaged(_make_answers, _use_answers, ("cache/autotune/*",), 700),
    "finished run": Damaged(_fit, _fit, ("run/**/*",), 300),
    "stopped run": Damaged(_make_cut_run, _fit, ("run/**/*",), 100),
    "prefix cache": Damaged(_fit_with_prefix, _fit_with_prefix, ("cache/**/*",), 60),
    "prompt cache": Damaged(_fit_with_prompts, _fit_with_prompts, ("cache/**/*",), 40),
    "converted model": Damaged(_load_converted, _load_converted, ("cache/**/*",), 60),
    "base": Damaged(save_base, _load_base, ("base/*",), 40, free=True),
}


def same(one: object, other: object) -> bool:
    """Whether two readings gave the same, to the last bit where they are not `Near`."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
