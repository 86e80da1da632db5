"""What each table and figure needs: slots, each with a row, a column and the cells, one per seed, that fill it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.accuracy.method_table import COMBINED, METHODS, SELECTOR_LABELS, SIZES, TASKS, VARIANTS, applies
from benchmarks.accuracy.paper_cells import Cell, as_options
from benchmarks.accuracy.settings import EXPERIMENTS, FIRST_SEED, Settings

CONTROLS = ("majority", "constrained", "five_shot")
TABLE1 = (*CONTROLS, "zero_shot", "iti", "repe", "lofit")
TABLE3 = ("lora", "red", "loreft", "jola", "lofit")
TABLE5 = ("zero_shot", "iti", "repe", "lofit")
# what the other models than the first have
LITTLE = ("zero_shot", "lofit")
# the task whose model is judged out of domain
TRAINED_FOR_OUTSIDE = "truthfulqa"
SWEPT = ("lofit", "lora")


@dataclass(frozen=True)
class Slot:
    """A place in a table, or a point or bar of a figure.

    row: a method, a selector, or a task heads come from. column: the task judged, or the value of a sweep.
    """

    experiment: str
    model: str
    row: str
    column: str | int | float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Available:
    """What the data folder holds. train, validation: examples per task. outside: tasks only judged that are there."""

    train: Mapping[str, int]
    validation: Mapping[str, int]
    outside: tuple[str, ...] = ()


class Plan:
    """The slots of all experiments, in order of what matters most. Cells lack only what tuning will choose."""

    def __init__(self, settings: Settings, available: Available) -> None:
        self.settings, self.available = settings, available
        self.tasks = tuple(task for task in settings.tasks if task in available.train)

    def slots(self) -> list[Slot]:
        """Every slot of the experiments asked for."""
        chosen = [name for name in EXPERIMENTS if name in self.settings.only]
        return [slot for name in chosen for slot in _SLOTS[name](self)]

    def cells(
        self,
        method: str,
        task: str,
        model: str | None = None,
        n_seeds: int | None = None,
        some_heads: bool = False,
        **changes,
    ) -> tuple[Cell, ...]:
        """One cell per seed. n_seeds: other than the task's own. some_heads: of a method that chooses heads, never all
        of them. changes: of `Cell`'s fields, from the plain cell.
        """
        settings, learns = self.settings, METHODS[method].learns
        outside = self.outside() if task == TRAINED_FOR_OUTSIDE and method in TABLE5 else ()
        cell = Cell(
            model=model or settings.models[0],
            task=task,
            method=method,
            seed=FIRST_SEED,
            train_size=_at_most(self.available.train[task], settings.train_size) if learns else 0,
            n_validation=_at_most(self.available.validation[task], settings.n_validation),
            epochs=settings.epochs if METHODS[method].epochs else 0,
            selector="lofit" if METHODS[method].chooses else "",
            outside=outside,
            n_outside=settings.n_outside if outside else 0,
            some_heads=some_heads and METHODS[method].chooses,
        )
        # what learns nothing has nothing that a seed could change
        count = (n_seeds or settings.n_seeds(task)) if learns else 1
        return tuple(replace(cell, seed=seed, **changes) for seed in range(FIRST_SEED, FIRST_SEED + count))

    def sized(self, method: str, task: str, value: float | None, model: str | None = None) -> tuple[Cell, ...]:
        """A method's cells at one of its sizes: the main ones at the size that its settings are tuned at."""
        sizes = SIZES[method]
        if value != sizes.default:
            options = as_options({sizes.option: value})
            return self.cells(method, task, model, some_heads=True, options=options, outside=(), n_outside=0)
        # tuning may choose another size for the main ones
        asked = {sizes.option: value} if sizes.tuned and self.settings.n_tuning else {}
        return self.cells(method, task, model, some_heads=True, options=as_options(asked))

    def outside(self) -> tuple[str, ...]:
        """The tasks a model tuned on `TRAINED_FOR_OUTSIDE` is judged on."""
        return (*(task for task in self.tasks if task != TRAINED_FOR_OUTSIDE), *self.available.outside)

    def of(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the wanted tasks that are run; the first that is, where none would be left."""
        return tuple(task for task in self.tasks if task in wanted) or self.tasks[:1]


def _table(
    experiment: str, methods: tuple[str, ...], tasks: tuple[str, ...], plan: Plan, some_heads: bool = False
) -> Iterator[Slot]:
    model = plan.settings.models[0]
    for task in tasks:
        for method in (m for m in methods if applies(m, task)):
            yield Slot(experiment, model, method, task, plan.cells(method, task, some_heads=some_heads))


def _table1(plan: Plan) -> Iterator[Slot]:
    yield from _table("table1", TABLE1, plan.tasks, plan)
    for model in plan.settings.models[1:]:
        for task in plan.tasks:
            for method in LITTLE:
                yield Slot("table1", model, method, task, plan.cells(method, task, model))


def _table2(plan: Plan) -> Iterator[Slot]:
    for task in plan.of(plan.settings.selection_tasks):
        for name in SELECTOR_LABELS:
            cells = plan.cells("lofit", task, some_heads=True, selector=name)
            yield Slot("table2", plan.settings.models[0], name, task, cells)


def _table3(plan: Plan) -> Iterator[Slot]:
    yield from _table("table3", TABLE3, plan.of(plan.settings.peer_tasks), plan)


def _table5(plan: Plan) -> Iterator[Slot]:
    if TRAINED_FOR_OUTSIDE not in plan.tasks:
        return
    for method in TABLE5:
        for task in (TRAINED_FOR_OUTSIDE, *plan.outside()):
            yield Slot("table5", plan.settings.models[0], method, task, plan.cells(method, TRAINED_FOR_OUTSIDE))


def _transfer(plan: Plan) -> Iterator[Slot]:
    """Rows are the tasks the heads are chosen on, or 0-shot; columns the tasks the offsets are tuned on."""
    model = plan.settings.models[0]
    for task in plan.of(plan.settings.transfer_tasks):
        yield Slot("transfer", model, "zero_shot", task, plan.cells("zero_shot", task))
        for source in plan.tasks:
            theirs = {"heads_from": source, "heads_size": plan.cells("lofit", source)[0].train_size}
            changes = theirs if source != task else {}
            yield Slot("transfer", model, source, task, plan.cells("lofit", task, some_heads=True, **changes))
        yield Slot("transfer", model, "random", task, plan.cells("lofit", task, some_heads=True, selector="random"))


def _layers(plan: Plan) -> Iterator[Slot]:
    for task in plan.tasks:
        yield Slot("layers", plan.settings.models[0], "lofit", task, plan.cells("lofit", task, some_heads=True))


def _sizes(plan: Plan) -> Iterator[Slot]:
    for task in plan.of(plan.settings.sweep_tasks):
        whole = plan.cells("lofit", task)[0].train_size
        for size in sorted({min(size, whole) for size in plan.settings.sizes} | {whole}):
            for method in SWEPT:
                cells = plan.cells(method, task, train_size=size)
                yield Slot("sizes", plan.settings.models[0], f"{task}/{method}", size, cells)


def _tops(plan: Plan) -> Iterator[Slot]:
    for task in plan.of(plan.settings.sweep_tasks):
        for top in plan.settings.tops:
            yield Slot("tops", plan.settings.models[0], task, top, plan.sized("lofit", task, top))


def _variants(plan: Plan) -> Iterator[Slot]:
    yield from _table("variants", ("lofit", *VARIANTS), plan.of(plan.settings.peer_tasks), plan, some_heads=True)


def _preset(plan: Plan) -> Iterator[Slot]:
    candidates, count = plan.settings.candidates, plan.settings.candidate_seeds
    for model in plan.settings.models:
        for task in plan.of(plan.settings.peer_tasks):
            for method in ("lofit", *candidates):
                yield Slot("preset", model, method, task, plan.cells(method, task, model, count))


def _parameters(plan: Plan) -> Iterator[Slot]:
    """Rows are methods, columns tasks, a slot for each size."""
    first, *others = plan.settings.models
    for task in plan.of(plan.settings.parameter_tasks):
        for method, sizes in SIZES.items():
            for value in sizes.values:
                yield Slot("parameters", first, method, task, plan.sized(method, task, value))
            for model in others:
                for value in sizes.other_models:
                    yield Slot("parameters", model, method, task, plan.sized(method, task, value, model))


def _combining(plan: Plan) -> Iterator[Slot]:
    # the two whose settings the others take come first
    methods, tasks = ("lofit", "lora", *COMBINED), plan.of(plan.settings.sweep_tasks)
    yield from _table("combining", methods, tasks, plan, some_heads=True)


_SLOTS = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table5": _table5,
    "transfer": _transfer,
    "layers": _layers,
    "sizes": _sizes,
    "tops": _tops,
    "variants": _variants,
    "preset": _preset,
    "parameters": _parameters,
    "combining": _combining,
}


def _at_most(there: int, asked: int | None) -> int:
    return there if asked is None else min(there, asked)


def labelled(name: str) -> str:
    """A task's or method's name as tables write it."""
    table = {**{k: m.label for k, m in METHODS.items()}, **{k: t.label for k, t in TASKS.items()}}
    return table.get(name, name)
