"""The settings of fast runs as rows, and the cells that compare them with the paper's two steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

from benchmarks.accuracy.cell_settings import agree
from benchmarks.accuracy.paper_cells import TUNING, VALIDATION, CellFolder, Options, as_options, main_metric
from lofit_fast.config import FAST_ANSWER, RECIPES, Recipe
from lofit_fast.training.engine import Engine

FULL = "full"
SEEDS = (42, 43, 44)
EPOCHS = 5


@dataclass(frozen=True)
class Setting:
    """recipe, engine: fields of either that differ from the full run's. tries: what is tuned of it, as recipe fields.

    tries: none means the full run's tuned settings. tasks: that it is run on, none means all.
    """

    label: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    engine: Mapping[str, object] = field(default_factory=dict)
    tries: tuple[Mapping[str, object], ...] = ()

    @property
    def exists(self) -> bool:
        """Whether this version has the fields."""
        known = {name.name for kind in (Recipe, Engine) for name in fields(kind)}
        return known >= {*self.recipe, *self.engine}


def _saliency(examples: int | None) -> dict[str, object]:
    return {"select": "saliency", "select_examples": examples}


# what `--fast --positions answer` tunes with, and the same for twice as long
_WIDE: dict[str, object] = {"positions": "answer", **FAST_ANSWER}
_LONG: dict[str, object] = {**_WIDE, "tune_epochs": 10}
_IN_WORDS = f"answers' tokens alone, {100 * FAST_ANSWER['top']:g} % of the heads, rate {FAST_ANSWER['tune_lr']}"
SETTINGS: dict[str, Setting] = {
    FULL: Setting("step 1, full precision"),
    "saliency-64": Setting("saliency, 64 examples", _saliency(64)),
    "saliency-128": Setting("saliency, 128 examples", _saliency(128)),
    "saliency-all": Setting("saliency, all examples", _saliency(None)),
    "saliency-32": Setting("saliency, 32 examples", _saliency(32)),
    "random": Setting("random heads", {"select": "random"}),
    "int8": Setting("step 1, int8 products", {}, {"frozen_products": "int8"}),
    "saliency-64-int8": Setting("saliency, 64 examples, int8 products", _saliency(64), {"frozen_products": "int8"}),
    # as many tries as the full run's settings had
    "answer": Setting(
        "step 1, answers' tokens alone",
        {"positions": "answer"},
        tries=({}, {"tune_lr": 4e-2}, {"top": 0.2}, {"tune_epochs": 10}),
    ),
    # vectors on fewer tokens have room for more heads and larger steps
    "answer-wide": Setting(f"step 1, {_IN_WORDS}, 10 epochs", _LONG),
    "saliency-64-answer-wide": Setting(f"saliency, 64 examples, {_IN_WORDS}, 10 epochs", {**_saliency(64), **_LONG}),
    "saliency-64-answer-wide-5": Setting(f"saliency, 64 examples, {_IN_WORDS}", {**_saliency(64), **_WIDE}),
}
# settings in the order of what matters most: all seeds and tasks of a group come before the next group
GROUPS = (
    (FULL, "saliency-64", "saliency-128", "saliency-all"),
    ("saliency-64-answer-wide-5", "saliency-64-answer-wide", "answer-wide"),
    ("saliency-64-int8", "int8"),
    ("answer",),
    ("saliency-32", "random"),
)
# what the full run has here: the best of four settings by examples set aside, a shorter search than today's tables have
_TUNED: dict[str, dict[str, object]] = {"select_lr": 2e-3, "tune_lr": 2e-2, "top": 0.1}
TUNED: dict[tuple[str, str], dict[str, object]] = {
    ("gemma3-270m", "mquake"): {"top": 0.2},
    ("gemma3-270m", "clutrr"): {"top": 0.2},
}
# a training set of this many examples is no other one than all
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class FastCell:
    """One setting on one task with one seed. The fields are those of `paper_cells.Cell`; setting: a key of SETTINGS.

    options: what tuning has chosen of the setting's tries.
    """

    model: str
    task: str
    setting: str
    seed: int
    train_size: int
    n_validation: int
    options: Options = ()
    split: str = VALIDATION

    def spec(self) -> dict[str, object]:
        """The cell as JSON holds it."""
        return {**asdict(self), "options": dict(self.options)}

    @property
    def name(self) -> str:
        """The name of its file."""
        digest = hashlib.sha256(json.dumps(self.spec(), sort_keys=True).encode()).hexdigest()[:10]
        parts = (self.model, self.task, self.setting, f"seed{self.seed}", f"n{self.train_size}", self.split)
        return ".".join(parts).replace("/", "_") + f".{digest}"

    def recipe(self) -> Recipe:
        """How it is trained."""
        base = {"select_epochs": EPOCHS, "tune_epochs": EPOCHS, **RECIPES.get(self.task, {})}
        tuned = TUNED.get((self.model, self.task), _TUNED)
        own = {**SETTINGS[self.setting].recipe, **dict(self.options)}
        return Recipe(**{**base, **tuned, **own, "seed": self.seed})

    def engine(self) -> Engine:
        """How its steps are run."""
        return Engine(**SETTINGS[self.setting].engine)


def as_today(cell: FastCell, content: Mapping) -> bool:
    """Whether a finished cell has the recipe and the engine that it would be run with today."""
    return agree(asdict(cell.recipe()), content["settings"]) and agree(asdict(cell.engine()), content["engine"])


@dataclass(frozen=True)
class FastSlot:
    """A place in the table, which one cell fills: what `cell_loop.run_cells` goes through."""

    cells: tuple[FastCell, ...]


def slots_of(
    models: tuple[str, ...],
    sizes: Mapping[str, tuple[int, int]],
    seeds: tuple[int, ...] = SEEDS,
    settings: tuple[str, ...] = tuple(SETTINGS),
) -> list[FastSlot]:
    """A slot per cell, the most valuable first. sizes: task -> (training examples, questions).

    Left out are settings that this version lacks, and numbers of examples that are all there are.
    """
    wanted = [
        FastCell(model, task, setting, seed, *sizes[task])
        for model in models
        for group in GROUPS
        for seed in seeds
        for task in sizes
        for setting in group
        if setting in settings and SETTINGS[setting].exists
    ]
    return [FastSlot((cell,)) for cell in wanted if not _is_all(cell)]


def _is_all(cell: FastCell) -> bool:
    asked = SETTINGS[cell.setting].recipe.get("select_examples")
    return asked is not None and asked > _NEARLY_ALL * cell.train_size


class FastTuning:
    """Which of a setting's tries its cells run with; see `tuning.Tuning`, whose interface this is."""

    def __init__(self, folder: CellFolder) -> None:
        self.folder = folder

    def runs(self, cell: FastCell) -> list[FastCell]:
        """The tuning cells that a cell waits for, shared by its seeds: a quarter of the examples judges."""
        held_out = cell.train_size // 4
        size = {"train_size": cell.train_size - held_out, "n_validation": held_out}
        plain = replace(cell, seed=SEEDS[0], split=TUNING, **size)
        return [replace(plain, options=as_options(tried)) for tried in SETTINGS[cell.setting].tries]

    def unknown(self, runs: Sequence[FastCell]) -> int:
        """How many runs there may be beside those that are known: none, since a setting's tries are."""
        return 0

    def settled(self, cell: FastCell, so_far: bool = False) -> FastCell | None:
        """The cell with the best settings; None while a tuning run is missing. Of equals the first is taken.

        so_far: no matter here, where all tries are a start grid.
        """
        runs = self.runs(cell)
        results = [self.folder.result(run) for run in runs]
        if None in results:
            return None
        if not runs:
            return cell
        hits = [result["metrics"][main_metric(result["metrics"])] for result in results]
        return replace(cell, options=runs[hits.index(max(hits))].options)


def compared(folder: CellFolder, slots: list[FastSlot]) -> Iterator[tuple[FastCell, dict]]:
    """Every finished cell of the slots, tuned as it was, and its result."""
    tuning = FastTuning(folder)
    for slot in slots:
        for cell in slot.cells:
            settled = tuning.settled(cell)
            result = None if settled is None else folder.result(settled)
            if result is not None:
                yield cell, result
