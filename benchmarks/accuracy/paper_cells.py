"""A cell: one method on one task with one seed, the JSON file it leaves, and the folder those files lie in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from lofit_fast.files import writable_folder, write_text

Options = tuple[tuple[str, object], ...]
VALIDATION, TUNING = "validation", "tuning"
# the metric a table shows, by which settings are chosen and which `hits` are of: the first that a task has
MAIN_METRICS = ("exact_match", "mc1")


@dataclass(frozen=True)
class Cell:
    """Everything a result depends on, and nothing of the tables it goes into.

    model, task: a name of `load_model` and of `TASKS`. method: a key of `METHODS`. seed: of the training data drawn,
    the initial vectors and the order. train_size, n_validation: examples, both as counts. epochs: of each step.
    selector: how LoFiT's heads are chosen, a key of `SELECTORS`. heads_from, heads_size: the task they are chosen on,
    and how many of its examples; "" and 0 for its own. options: hyperparameters that differ from the method's defaults,
    by name. outside: other tasks the trained model is judged on, and n_outside questions of each. split: what it is
    judged by; "tuning" is set aside from the training data. some_heads: tuning may not choose all heads for it, since
    it asks which heads they are; no part of a result, and false once its settings are chosen.
    """

    model: str
    task: str
    method: str
    seed: int
    train_size: int
    n_validation: int
    epochs: int
    selector: str = ""
    heads_from: str = ""
    heads_size: int = 0
    options: Options = ()
    outside: tuple[str, ...] = ()
    n_outside: int = 0
    split: str = VALIDATION
    some_heads: bool = False

    def spec(self) -> dict[str, object]:
        """The cell as JSON holds it."""
        spec = {**asdict(self), "options": dict(self.options), "outside": list(self.outside)}
        return {key: value for key, value in spec.items() if key != "some_heads"}

    @property
    def name(self) -> str:
        """The name of its file: readable, and told from every other cell's by a digest of all it is."""
        return _name(self)


# a search asks for the names of its runs again and again
@cache
def _name(cell: Cell) -> str:
    digest = hashlib.sha256(json.dumps(cell.spec(), sort_keys=True).encode()).hexdigest()[:10]
    heads = "-".join(part for part in (cell.selector, cell.heads_from and f"of-{cell.heads_from}") if part)
    parts = [Path(cell.model).name, cell.task, cell.method, heads, f"seed{cell.seed}", f"n{cell.train_size}"]
    parts += [f"{key}={value}" for key, value in cell.options] + [cell.split] * (cell.split != VALIDATION)
    return re.sub(r"[^\w.=-]+", "_", ".".join(part for part in parts if part))[:120] + f".{digest}"


def as_options(options: Mapping[str, object]) -> Options:
    """A mapping as a cell holds it, in the order of the names."""
    return tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in options.items()))


def main_metric(metrics: Mapping[str, float]) -> str:
    """The name of the metric that a table shows. Raises ValueError when there is none."""
    for name in MAIN_METRICS:
        if name in metrics:
            return name
    raise ValueError(f"expected one of {', '.join(MAIN_METRICS)} among the metrics, got {sorted(metrics)}")


class CellFolder:
    """The finished cells of a folder: written whole or not at all, and made anew where their settings have changed.

    current: (cell, what its file holds) -> whether it would be run with the same today; None means that it would.
    """

    def __init__(self, path: Path | str, current: Callable[[Cell, Mapping], bool] | None = None) -> None:
        self.path, self._current = Path(path), current
        # None for a file that is there and is of other settings
        self._read: dict[str, dict | None] = {}

    def result(self, cell: Cell) -> dict | None:
        """What a finished cell holds, or None. Raises ValueError for a file that is not whole JSON."""
        name = cell.name
        if name not in self._read and (path := self.path / f"{name}.json").is_file():
            try:
                content = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not whole JSON: {error}") from error
            same = self._current is None or self._current(cell, content)
            self._read[name] = content if same else None
        return self._read.get(name)

    def write(self, cell: Cell, result: Mapping[str, object]) -> None:
        """Keep a finished cell. result: what `Executor` returns."""
        writable_folder(self.path)
        content = {"cell": cell.spec(), **result}
        write_text(self.path / f"{cell.name}.json", _readable(content))
        self._read[cell.name] = json.loads(json.dumps(content))


def cell_of(spec: Mapping[str, object]) -> Cell:
    """The cell that `Cell.spec` came from. Raises ValueError for another set of keys."""
    expected = {field.name for field in fields(Cell)} - {"some_heads"}
    if spec.keys() != expected:
        raise ValueError(f"expected a cell of {sorted(expected)}, got {sorted(spec)}")
    return Cell(**{**spec, "options": as_options(spec["options"]), "outside": tuple(spec["outside"])})


def _readable(content: object) -> str:
    """Indented JSON with lists of numbers on one line: hundreds of hits would be hundreds of lines."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"
