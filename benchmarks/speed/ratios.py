"""summary.json: the ratios of the present machine, from its cells.

python -m benchmarks.speed.ratios [RESULTS ...]    # again, from each folder's own cells; nothing is timed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.speed.cells import RESULTS, Store
from benchmarks.speed.elsewhere import filled
from benchmarks.speed.results import largest_peak
from benchmarks.speed.step.packaged_models import MODELS
from benchmarks.speed.timing import machine, ratio
from lofit_fast.files import write_json

STEPS = ("step 1", "step 2")
# where a hook ran in our engine: the peers, whose layers are not compiled, for results without it among the steps
ONE_ENGINE = ("steps", "peers same engine")


def write_summary(results: Path, store: Store, planned: Sequence[str] = ()) -> Path:
    """Write <results>/summary.json from the cells of one machine, whatever is there of them; see `elsewhere` too.

    planned: names of the cells there should be, so that the report can say which are not.
    """
    meta = {
        **machine(),
        "results": store.folder.name,
        "stamp": store.stamp,
        "data": store.stamp["data"],
        "planned": list(planned),
        "evidence": "GPU clock" if machine()["device"] != "cpu" else "CPU clock",
    }
    return _written(results, store, meta)


def rewrite_summary(results: Path) -> Path:
    """Write <results>/summary.json again, from the very cells that it was made of, wherever that was."""
    meta = json.loads((results / "summary.json").read_text())["meta"]
    return _written(results, Store(results / meta["results"], meta["stamp"]), meta)


def _written(results: Path, store: Store, meta: dict) -> Path:
    path = results / "summary.json"
    summary = {**{model: summarize(store.read, model) for model in MODELS}, "meta": meta}
    write_json(path, filled(summary, results))
    return path


def summarize(read: Callable[[str], dict | None], model: str) -> dict:
    """One model's keys: the worse of the two steps, its interval, and the rows it is the worse of; None if not there.

    read: a cell's content by name, None if it was not measured.
    """
    steps, peak = read(f"{model}/steps"), _memory(read, model)
    int8 = _rows(steps, ("ours", "same engine"), ("ours", "int8"))
    summary = {
        **_worse("vs_hook_as_run", _rows(steps, ("hook", "as run"), ("ours", "same engine")), min),
        **_in_one_engine(read, model),
        **_worse("vs_lora_all_as_run", _rows(steps, ("lora_all", "as run"), ("ours", "same engine")), min),
        **_worse("vs_floor", _rows(steps, ("ours", "same engine"), ("floor", "same engine")), max),
        # promised of step 2
        **_one("int8_speedup", int8.get("step 2")),
        "int8_speedup_rows": int8,
        **_worse("vs_hook_as_run_int8", _rows(steps, ("hook", "as run"), ("ours", "int8")), min),
        "peak_memory_vs_hook": max((row["peak"] for row in peak.values()), default=None),
        "peak_memory_vs_hook_rows": peak,
    }
    prefix, scoring, sweep = (read(f"{model}/{name}") or {} for name in ("prefix cache", "scoring", "sweep"))
    seconds = {row["peer"]: row.get("seconds") for row in prefix.get("rows", [])}
    summary |= _one("prefix_cache_speedup", _ratio(seconds.get("off"), seconds.get("on")))
    answers, fast = (read(f"{model}/{name}") or {} for name in ("answer only", "fast run"))
    summary |= _answers(answers)
    for run, cell in (("fast_run", fast), ("fast_run_all_positions", read(f"{model}/fast run all positions") or {})):
        for peer in ("hook", "lora_all"):
            whole = cell.get("whole_run_seconds", {}).get(peer)
            summary |= _one(f"{run}_vs_{peer}", _ratio(whole, whole and [cell["ours"]["seconds"]] * len(whole)))
    careful = read(f"{model}/careful steps")
    for peer in ("hook", "lora_all"):
        pair = (
            _seconds(careful, name, setting, "step 2")
            for name, setting in ((peer, "tuned stock"), ("ours", "same engine"))
        )
        summary |= _one(f"vs_{peer}_tuned_stock", _ratio(*pair))
    seconds = scoring.get("seconds", {})
    summary |= _one("mc_scoring_speedup", _ratio(seconds.get("per_answer"), seconds.get("packed")))
    if sweep:
        summary |= _one("sweep_speedup", sweep.get("speedup"))
        summary |= _one("sweep_jobs_speedup", sweep.get("speedup_jobs"))
    missing = {"steps": steps, "prefix cache": prefix, "scoring": scoring, "answer only": answers, "fast run": fast}
    reasons = {name: (cell or {}).get("absent", "not measured") for name, cell in missing.items() if not _whole(cell)}
    return {**summary, "absent": reasons}


def _whole(cell: dict | None) -> bool:
    return bool(cell) and "absent" not in cell


def _rows(cell: dict | None, numerator: tuple[str, str], denominator: tuple[str, str]) -> dict[str, dict]:
    """Per step the ratio of two peers that were timed in the same rounds."""
    found = {}
    for step in STEPS:
        pair = [_seconds(cell, peer, setting, step) for peer, setting in (numerator, denominator)]
        if made := _ratio(*pair):
            found[step] = made
    return found


def _seconds(cell: dict | None, peer: str, setting: str, step: str) -> list[float] | None:
    for row in (cell or {}).get("rows", []):
        if (row["peer"], row["setting"]) == (peer, setting) and row["step"] in (step, ""):
            return row.get("seconds")
    return None


def _ratio(numerator: list[float] | None, denominator: list[float] | None) -> dict | None:
    return asdict(ratio(numerator, denominator)) if numerator and denominator else None


def _worse(key: str, rows: dict[str, dict], worse: Callable) -> dict:
    # one step alone is no row of the table: the missing one could be the worse
    chosen = worse(rows.values(), key=lambda row: row["median"]) if len(rows) == len(STEPS) else None
    return {**_one(key, chosen), f"{key}_rows": rows}


def _in_one_engine(read: Callable[[str], dict | None], model: str) -> dict:
    """A hook against ours in the very same engine, the worse of the steps that were timed; `_rows` says which."""
    key, pair = "vs_hook_same_engine", (("hook", "same engine"), ("ours", "same engine"))
    found = (_rows(read(f"{model}/{name}"), *pair) for name in ONE_ENGINE)
    rows = next((rows for rows in found if rows), {})
    return {**_one(key, min(rows.values(), key=lambda row: row["median"], default=None)), f"{key}_rows": rows}


def _one(key: str, made: dict | None) -> dict:
    if not made:
        return {key: None, f"{key}_interval": None, f"{key}_rounds": None}
    interval = None if made["low"] is None else [made["low"], made["high"]]
    return {key: made["median"], f"{key}_interval": interval, f"{key}_rounds": made.get("rounds")}


def _answers(cell: dict) -> dict:
    """What filling took is counted once over the epochs of a run; the interval is that of epochs without it."""
    key, steps = "answer_only_epoch_speedup", cell.get("steps", {})
    worst = min(steps.values(), key=lambda one: one["speedup_with_filling"], default=None)
    filled = {f"{key}_filled": worst and worst["speedup"]["median"]}
    interval = worst and [worst["speedup"]["low"], worst["speedup"]["high"]]
    filled |= {f"{key}_filled_interval": interval, f"{key}_filled_rounds": cell.get("rounds")}
    return {key: worst and worst["speedup_with_filling"], **filled}


def _memory(read: Callable[[str], dict | None], model: str) -> dict[str, dict]:
    """Per step, our peak over the hook's: over the first steps, compiling included, over later ones, and over all."""
    found = {}
    for step in STEPS:
        ours, hook = (read(f"{model}/memory {name} {step}") for name in ("ours", "hook"))
        if _whole(ours) and _whole(hook):
            pair = {"first": "first_peak", "steady": "steady_peak"}
            rows = {name: ours[key] / hook[key] for name, key in pair.items()}
            found[step] = {**rows, "peak": largest_peak(ours) / largest_peak(hook)}
    return found


def main(
    results: Annotated[list[Path] | None, typer.Argument(help="Folders with a summary.json of make bench.")] = None,
) -> None:
    """Write summaries again from their cells. Nothing is measured."""
    for folder in results or [RESULTS]:
        print(f"wrote {rewrite_summary(folder)}")


if __name__ == "__main__":
    typer.run(main)
