"""The runs of a sweep, read from a TOML file and checked before anything is loaded."""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from lofit_fast.config import OF_CHOICE, RECIPES, GivenHeads, Recipe, check_choice, fast_settings
from lofit_fast.data.given_examples import at_rest
from lofit_fast.heads import heads_asked
from lofit_fast.tasks.row_source import check_columns
from lofit_fast.training.engine import Engine
from lofit_fast.training.sweep.run_names import given_name, name_of, same_folder

RECIPE_KEYS = tuple(field.name for field in fields(Recipe))
# what all runs have in common, since they share one loaded base, and what each may have of its own
ENGINE_KEYS = tuple(field.name for field in fields(Engine))
# how the data is read, as options of `load_task`
READING_KEYS = ("split", "subset", "columns", "train_on")
COMMON_KEYS = ("model", "task", "data", "data_seed", "dtype", "device", *READING_KEYS, *ENGINE_KEYS)
RUN_KEYS = ("train_size", "heads", *RECIPE_KEYS)
_TABLES = ("base", "grid", "runs")
_WORDS = (
    "model",
    "task",
    "data",
    "split",
    "subset",
    "train_on",
    "dtype",
    "device",
    "heads",
    "name",
    "select",
    "positions",
)
_FLAGS = ("tune_scales",)
# whole numbers -> the least
_COUNTS = {"train_size": 1, "data_seed": 0, "select_examples": 1}
# combinations of a grid; more are a slip
MOST_RUNS = 10_000


@dataclass(frozen=True)
class Run:
    """One training. varied: what tells it from the others, as written. heads: to tune, instead of step 1.

    train_size: training examples, or None for all of the task's.
    """

    name: str
    varied: dict[str, object]
    recipe: Recipe
    heads: GivenHeads = None
    train_size: int | None = None

    def __post_init__(self) -> None:
        # a run that is taken up again has its heads again
        object.__setattr__(self, "heads", at_rest(self.heads))


@dataclass(frozen=True)
class Grid:
    """A base model, a task and the runs on it. data_seed: of the task's draw, the same data for all runs.

    engine: how the steps of all runs are run. reading: how the data is read, as options of `load_task`.
    """

    model: str
    task: str
    data: str | None
    data_seed: int
    dtype: str
    device: str
    engine: Engine
    runs: tuple[Run, ...]
    reading: dict[str, object] = field(default_factory=dict)


def read_grid(path: Path | str, fast: bool = False) -> Grid:
    """A grid from a file of the tables [base], [grid] and [[runs]].

    [base]: model, and what else all runs share: task, data, split, subset, columns (a table), train_on, data_seed,
    dtype, device, the fields of Engine, and any setting of a run.
    [grid]: a list per setting; every combination is a run. [[runs]]: runs of their own, with an optional name.
    A setting of a run is a field of Recipe, train_size, or heads (the path of a heads.json, or "all"). Paths are seen
    from the working folder. fast: whether what the file leaves open is the fast preset's.
    Raises FileNotFoundError for no such file, ValueError naming the table, the key and what is expected there, and for
    what is no file of UTF-8 text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such sweep file: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no file, expected one of TOML")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    # a number of thousands of digits is no TOMLDecodeError
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    return parse_grid(content, str(path), fast)


def parse_grid(content: Mapping[str, object], where: str = "grid", fast: bool = False) -> Grid:
    """The same from a mapping. where: what errors call it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected tables, got {content!r}")
    _check_known(content, _TABLES, where, "table")
    base, axes, listed = content.get("base", {}), content.get("grid", {}), content.get("runs", [])
    if not isinstance(base, Mapping) or not isinstance(axes, Mapping):
        raise ValueError(f"{where}: expected [base] and [grid] to be tables")
    if not isinstance(listed, list) or not all(isinstance(row, Mapping) for row in listed):
        raise ValueError(f"{where}: expected runs to be tables, each headed [[runs]]")
    _check_values(base, (*COMMON_KEYS, *RUN_KEYS), f"{where}: [base]")
    if "model" not in base:
        raise ValueError(f"{where}: [base] needs model: an alias, a folder, a .gguf file or a hub id")
    varied = [*_product(axes, f"{where}: [grid]"), *_listed(listed, where)]
    if not varied:
        raise ValueError(f"{where}: no runs: expected a table [grid] of lists, or tables [[runs]]")
    task = base.get("task") or ("kinship" if base.get("data") is None else "completion")
    runs = tuple(_run(name, own, base, task, where, fast) for name, own in varied)
    if twice := same_folder(run.name for run in runs):
        raise ValueError(f"{where}: several runs are called {', '.join(twice)}: give each its own name")
    common = {"data": None, "data_seed": 42, "dtype": "auto", "device": "auto"}
    common = {key: base.get(key, default) for key, default in common.items()}
    try:
        check_columns(base.get("columns"))
        engine = (Engine.fast if fast else Engine)(**{key: base[key] for key in ENGINE_KEYS if key in base})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: [base]: {error}") from error
    reading = {key: base[key] for key in READING_KEYS if key in base}
    return Grid(model=base["model"], task=task, engine=engine, runs=runs, reading=reading, **common)


def _product(axes: Mapping[str, object], where: str) -> Iterable[tuple[str, dict]]:
    _check_known(axes, RUN_KEYS, where)
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where} {key}: expected a list of values, got {values!r}")
        for value in values:
            _check_values({key: value}, RUN_KEYS, where)
        if len({repr(value) for value in values}) < len(values):
            raise ValueError(f"{where} {key}: a value is listed twice: {values}")
    combinations = math.prod(len(values) for values in axes.values())
    if combinations > MOST_RUNS:
        raise ValueError(f"{where}: got {combinations} combinations, expected {MOST_RUNS} at most: list the [[runs]]")
    for values in itertools.product(*axes.values()) if axes else ():
        own = dict(zip(axes, values, strict=True))
        yield name_of(own), own


def _listed(rows: list[Mapping[str, object]], where: str) -> Iterable[tuple[str, dict]]:
    for number, row in enumerate(rows, start=1):
        _check_values(row, ("name", *RUN_KEYS), f"{where}: [[runs]] {number}")
        own = {key: value for key, value in row.items() if key != "name"}
        try:
            name = given_name(row["name"]) if "name" in row else name_of(own)
        except ValueError as error:
            raise ValueError(f"{where}: [[runs]] {number} name: {error}") from error
        yield name, own


def _run(name: str, own: dict, base: Mapping[str, object], task: str, where: str, fast: bool) -> Run:
    settings = {**{key: base[key] for key in RUN_KEYS if key in base}, **own}
    of_task, said = RECIPES.get(task, {}), {key: settings[key] for key in RECIPE_KEYS if key in settings}
    try:
        recipe = Recipe(**(fast_settings(said, of_task) if fast else {**of_task, **said}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: run {name}: {error}") from error
    try:
        heads = heads_asked(settings["heads"]) if "heads" in settings else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: run {name}: heads: {error}") from error
    try:
        # what is in [base] may be of other runs than this one
        of_choice = {key: key for key in own if key in OF_CHOICE}
        check_choice(of_choice, [recipe.select], None if heads is None else "heads")
    except ValueError as error:
        raise ValueError(f"{where}: run {name}: {error}") from error
    return Run(name, own, recipe, heads, settings.get("train_size"))


def _check_known(keys: Iterable[str], known: tuple[str, ...], where: str, kind: str = "key") -> None:
    for key in keys:
        if key in known:
            continue
        if key in COMMON_KEYS:
            raise ValueError(f"{where}: {key} cannot vary, since all runs share one loaded base: put it into [base]")
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise ValueError(f"{where}: unknown {kind} {key}: {hint}")


def _check_values(table: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    _check_known(table, known, where)
    for key, value in table.items():
        # the engine checks its own
        if key in ENGINE_KEYS:
            continue
        if key in _WORDS:
            right, expected = isinstance(value, str) and bool(value), "a text in quotes"
        elif key in _FLAGS:
            right, expected = isinstance(value, bool), "true or false"
        elif key == "columns":
            right, expected = isinstance(value, Mapping) and bool(value), 'a table such as {prompt = "question"}'
        elif key in _COUNTS:
            right, expected = type(value) is int and value >= _COUNTS[key], "a whole number"
        else:
            right, expected = type(value) in (int, float), "a number"
        if not right:
            raise ValueError(f"{where} {key}: expected {expected}, got {value!r}")
