"""Whole training steps of a model with random weights: every peer's loss checked, then all of them timed in turns.

A step is forward, backward, clipping and AdamW. Its batches are on the device before the clock starts, and nobody waits
for a loss. All peers share one set of frozen weights, each in modules of its own.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE, Absent
from benchmarks.speed.gpu import whole_models
from benchmarks.speed.step.loss_check import Checks, Reference, references
from benchmarks.speed.step.row_settings import STOCK
from benchmarks.speed.step.rows import Live, Row, live
from benchmarks.speed.step.workload import BATCH, Workload, real_tokens
from benchmarks.speed.timing import ratio
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.auto import settle

# draws of examples, of which the first is taken whose loss shows what the vectors do
DRAWS = 8
# which peers there are, in both settings; only LoFiT's depend on the step
_LOFIT, _OTHERS = ("ours", "hook", "compiled_hook"), ("lora", "lora_all")


def rows_of_step(step: str) -> list[Row]:
    """Every peer as its users run it and in our engine, the floors first. Ours as run is the patch and nothing else."""
    settings = (SAME_ENGINE, AS_RUN)
    rows = [Row("floor", setting) for setting in settings]
    rows += [Row(name, setting, step) for name in _LOFIT for setting in settings]
    return rows + [Row(name, setting) for name in _OTHERS for setting in settings]


@dataclass(frozen=True)
class Scene:
    """A model on the device and what everybody does with it. engine: ours; stock: of rows that are run as is."""

    model: nn.Module
    work: Workload
    engine: Engine
    stock: Engine
    device: str

    def live(self, row: Row):
        """The row's peer in modules of its own, see `rows.live`."""
        return live(self.model, row, self.engine, whole_models.sharing, self.stock)

    def described(self) -> dict[str, Any]:
        """Plain data for the results."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return {
            "layers": self.model.config.num_hidden_layers,
            "weight_bytes": weights,
            "engine": asdict(self.engine),
            "stock": asdict(self.stock),
            "workload": self.work.describe(),
        }


def scene(name: str, device: str, layers: int | None = None) -> Scene:
    """A row of `whole_models.MODELS`, with as many layers as are asked for or fit into free memory."""
    tidy(device)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    layers = layers or whole_models.layers_that_fit(name, device, free)
    model, work = whole_models.built(name, device, layers), whole_models.random_examples(name, device)
    # transformers' own choice: a model with caps on its scores has no sdpa
    stock = replace(STOCK, attention=model.config._attn_implementation)
    # compiled layers are for runs that are longer than a measurement
    engine, _ = settle(_Bare(model), Engine(compile=False), work.rows, work.pad, BATCH, epochs=1)
    return Scene(model, work, engine, stock, device)


@dataclass(frozen=True)
class _Bare:
    """A model with nothing in it, as `settle` takes it."""

    model: nn.Module

    def disabled(self) -> AbstractContextManager[None]:
        """There is nothing to disable."""
        return nullcontext()


def time_steps(task: dict[str, Any]) -> dict[str, Any]:
    """All rows of a step of the task's model but those in "without"; with fewer layers where memory is short.

    Answers "layers" of "of_layers", and "rows": each with its check and the milliseconds of a step, or why it has none.
    """
    every = whole_models.n_layers(task["model"], task["device"])
    layers, short = task.get("layers"), []
    while True:
        try:
            task["now"]("building the model")
            found = _timed(scene(task["model"], task["device"], layers), task)
            return {**found, "of_layers": every, "short_of_memory_with_layers": short}
        except torch.OutOfMemoryError:
            if layers == 1:
                raise
            short.append(layers or every)
            layers = max(1, (layers or every) // 2)
        # outside of the handler, which keeps the frames of what failed alive
        tidy(task["device"])


def checkable(place: Scene, task: dict[str, Any], steps: Sequence[str]) -> tuple[Scene, dict[str, Reference]]:
    """The scene with examples whose loss depends on the vectors, and what the losses must be, by step.

    With random weights a change of the vectors has no sign, and its mean over few tokens may be too small to prove
    anything: other examples are drawn then. Raises ValueError where none of DRAWS proves anything.
    """
    for seed in range(DRAWS):
        task["now"]("exact losses")
        work = whole_models.random_examples(task["model"], place.device, seed)
        try:
            return replace(place, work=work), references(place.model, work, dict.fromkeys(steps))
        except ValueError as proves_nothing:
            said = proves_nothing
    raise ValueError(f"{DRAWS} draws of examples: {said}")


def _timed(place: Scene, task: dict[str, Any]) -> dict[str, Any]:
    rows = [row for row in rows_of_step(task["step"]) if str(row) not in task.get("without", {})]
    place, expected = checkable(place, task, [row.step for row in rows])
    tidy(place.device)
    entries, ready = [], {}
    with ExitStack() as scopes, torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for row in rows:
            task["now"](str(row))
            entry, one = _prepared(scopes, place, row, Checks(place.model, place.work, expected[row.step]))
            entries.append({**asdict(row), **entry})
            if one is not None:
                ready[len(entries) - 1] = one
        taken = _rounds(place, ready, rows, task)
    tokens = [real_tokens(place.work.drawn(number, task["examples"])) for number in range(1, task["rounds"] + 1)]
    for at, seconds in taken.items():
        entries[at] |= _summary(seconds, tokens, task["examples"])
    _compare(entries, taken)
    return {"rows": entries, "real_tokens": tokens, "examples_per_round": task["examples"], **place.described()}


def _prepared(scopes: ExitStack, place: Scene, row: Row, checks: Checks) -> tuple[dict[str, Any], Live | None]:
    """The row's entry, and the row ready to be timed if its loss is right."""
    started = time.perf_counter()
    # its own stack: a row that fails half-way leaves nothing in the device's memory
    with ExitStack() as own:
        try:
            one = own.enter_context(place.live(row))
            check = checks(one)
            entry: dict[str, Any] = {"check": check.as_dict()}
            if not check.ok:
                red = f"loss {check.loss:.5f}, expected {check.reference:.5f} +- {check.tolerance:.5f}"
                return entry | {"red": red}, None
            batches = one.batches(place.work.drawn(0, 2 * BATCH), place.work.pad)
            for batch in batches:
                one.update(batch)
            entry |= {"peak_bytes": _peak(one, batches[0], place.device)}
        except Exception as failure:
            return why_not(failure, place.device), None
        scopes.push(own.pop_all())
    return entry | {"warm_seconds": time.perf_counter() - started}, one


def why_not(failure: Exception, device: str) -> dict[str, str]:
    """Why a row has no numbers: absent, skipped for want of memory, or an error.

    Raises what the device raises where nothing works there any more: that ends the process, and is reported.
    """
    if isinstance(failure, Absent):
        return {"absent": str(failure)}
    if isinstance(failure, torch.OutOfMemoryError):
        return {"skipped": "out of memory"}
    if device == "cuda":
        torch.cuda.synchronize()
    return {"error": f"{type(failure).__name__}: {str(failure).strip()[:400]}"}


def _peak(one: Live, batch: dict, device: str) -> int | None:
    """Bytes that a step takes above the weights and vectors, on a GPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one.update(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rounds(place: Scene, ready: dict[int, Live], rows: Sequence[Row], task: dict[str, Any]) -> dict[int, list[float]]:
    """Seconds per round; rounds in turns, each with the same examples for all, until the task's seconds are over."""
    until = time.perf_counter() + task["seconds"]
    taken: dict[int, list[float]] = {at: [] for at in ready}
    for number in range(1, task["rounds"] + 1):
        if number > 3 and time.perf_counter() > until:
            break
        for at, one in _turned(ready, number):
            task["now"](str(rows[at]))
            batches = one.batches(place.work.drawn(number, task["examples"]), place.work.pad)
            with clocked(place.device) as seconds:
                for batch in batches:
                    one.update(batch)
            taken[at] += seconds
    return taken


def _turned(ready: dict[int, Live], number: int) -> Iterator[tuple[int, Live]]:
    order = list(ready.items())
    shift = number % max(1, len(order))
    yield from order[shift:] + order[:shift]


@contextmanager
def clocked(device: str) -> Iterator[list[float]]:
    """A scope whose seconds are in the list afterwards: between two events on a GPU, idle time included."""
    seconds: list[float] = []
    if device != "cuda":
        began = time.perf_counter()
        yield seconds
        seconds.append(time.perf_counter() - began)
        return
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    yield seconds
    end.record()
    torch.cuda.synchronize()
    seconds.append(start.elapsed_time(end) / 1e3)


def _summary(seconds: Sequence[float], tokens: Sequence[int], examples: int) -> dict[str, Any]:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    rates = [count / each for count, each in zip(tokens, seconds, strict=False)]
    return {
        "ms_per_round": 1e3 * statistics.median(ordered),
        "quartiles_ms": [1e3 * ordered[quarter], 1e3 * ordered[-1 - quarter]],
        "tokens_per_s": statistics.median(rates),
        "examples_per_s": examples / statistics.median(ordered),
        "rounds": len(ordered),
    }


def _compare(entries: list[dict[str, Any]], taken: dict[int, list[float]]) -> None:
    """Add vs_floor and vs_hook: ratios to the floor and to the eager hook of the row's own setting."""
    for name in ("floor", "hook"):
        found = {entries[at]["setting"]: seconds for at, seconds in taken.items() if entries[at]["peer"] == name}
        for at, seconds in taken.items():
            if entries[at]["setting"] in found:
                entries[at][f"vs_{name}"] = asdict(ratio(seconds, found[entries[at]["setting"]]))


def tidy(device: str) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
