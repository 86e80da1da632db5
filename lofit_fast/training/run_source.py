"""Where a run's data came from, kept in state.json from the start: what it has held out is found again by that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lofit_fast.files import as_json, read_json
from lofit_fast.sealed import read_sealed
from lofit_fast.tasks.task import Task
from lofit_fast.training.run_clearing import STATE

# of a run's folders those that hold adapters too: the last one's of step 1, and checkpoints
_STAGES = ("select", "tune")
Source = Mapping[str, object]


def source_of(task: Task, data: str | Path | None, data_seed: int) -> dict[str, object]:
    """A task as a run keeps it. data: what it was read from. data_seed: of the draw that set evaluation data aside.

    "judged_by" is a digest of what it is judged by, in whatever order; "held_out" of the prompts alone, which is what
    runs of earlier releases have kept.
    """
    prompts = sorted(example.prompt for example in (*task.validation, *task.choices))
    whole = [[e.prompt, e.completion, *sorted(e.answers)] for e in task.validation]
    for c in task.choices:
        right = {c.choices[number] for number in c.correct}
        whole.append([c.prompt, c.choices[c.best], *sorted(right), "", *sorted(set(c.choices) - right)])
    # a hub id stays as it is
    read = os.path.abspath(data) if data is not None and os.path.exists(data) else data
    named = {"task": task.name, "data": None if read is None else str(read)}
    return {**named, "data_seed": data_seed, "held_out": _digest(prompts), "judged_by": _digest(sorted(whole))}


def _digest(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def kept_source(adapter: Path | str) -> dict[str, object]:
    """What the run that an adapter folder lies in says of its data; empty for an adapter of no run.

    Of a run of an earlier release it is in the summary, if it has got so far.
    Raises ValueError where that is damaged: what was trained on might be judged by.
    """
    run = _run_of(Path(os.path.abspath(adapter)))
    if run is None:
        return {}
    try:
        source = _read(run / STATE, read_sealed).get("source")
        found = source if isinstance(source, dict) else _read(run / "summary.json", read_json)
    except ValueError as error:
        raise ValueError(f"{error}; give the data seed of the run (--seed)") from error
    # something else's
    if "data_seed" not in found:
        return {}
    if type(found["data_seed"]) is not int:
        raise ValueError(
            f"{run} has the data_seed {found['data_seed']!r}, expected a whole number; give that of the run (--seed)"
        )
    return found


def data_seed_of(adapter: Path | str | None, otherwise: int = 42) -> int:
    """The data seed of the run that an adapter folder lies in, so that what was held out is again; or `otherwise`.

    Raises what `kept_source` raises.
    """
    return otherwise if adapter is None else kept_source(adapter).get("data_seed", otherwise)


def other_rows(adapter: Path | str | None, now: Source) -> str | None:
    """A sentence for judging by rows of the run's own data that are not those it has held out; None where all is well.

    now: `source_of` what is judged by. Of other data, or a run of an earlier release, nothing is known.
    """
    kept = {} if adapter is None else kept_source(adapter)
    now = as_json(dict(now))
    if "held_out" not in kept or any(kept.get(name) != now[name] for name in ("task", "data")):
        return None
    known = "judged_by" if "judged_by" in kept else "held_out"
    if kept[known] == now[known]:
        return None
    return (
        f"{now['data'] or now['task']} gives other rows to judge by than the run of {adapter} has held out, so that it "
        "may have been trained on some: its rows or their order have changed, or it is read with other options"
    )


def _run_of(adapter: Path) -> Path | None:
    """The folder of a run: RUN/adapter, RUN/select/adapter, and RUN/tune/checkpoint-3 are in one."""
    above = adapter.parent
    folders = [above, above.parent] if above.name in _STAGES else [above]
    return next((folder for folder in folders if any((folder / n).is_file() for n in (STATE, "summary.json"))), None)


def _read(path: Path, read) -> dict[str, object]:
    content = read(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
