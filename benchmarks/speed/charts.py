"""The benchmark's pictures: ratios with their brackets, memory, whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.results import BenchResults, label, largest_peak, peer_label
from lofit_fast.plots import new_figure, save_figure

_OURS, _OTHERS = "tab:blue", "tab:gray"
_GB = 1e9


def draw_all(results: BenchResults, folder: Path) -> dict[str, Path]:
    """Every picture there is data for, as PNG files in the folder: title -> path."""
    drawn: dict[str, Path | None] = {"Speed-ups and their brackets": _speedups(results, folder / "speedups.png")}
    for model in results.models():
        slug = model.lower()
        drawn[f"{model}: training step over the frozen floor"] = _steps(results, model, folder / f"steps-{slug}.png")
    drawn["Peak memory above the loaded model"] = _memory(results, folder / "memory.png")
    drawn["Whole runs, both steps"] = _whole_runs(results, folder / "whole-runs.png")
    return {title: path for title, path in drawn.items() if path is not None}


def _speedups(results: BenchResults, path: Path) -> Path | None:
    rows = [row for row in results.targets() if row.at_least and row.value is not None]
    if not rows:
        return None
    figure, axes = new_figure((9, 0.8 + 0.34 * len(rows)))
    values = [row.value for row in rows]
    names = [f"{row.words} ({row.model}{', ' + row.elsewhere if row.elsewhere else ''})" for row in rows]
    _bars(axes, names, values, [row.interval for row in rows], _OURS)
    bounds = [(row.bound, place) for place, row in enumerate(rows) if row.bound is not None]
    axes.scatter(
        [bound for bound, _ in bounds], [place for _, place in bounds], marker="|", s=180, color="black", label="target"
    )
    axes.set(xlabel="times faster")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def _steps(results: BenchResults, model: str, path: Path) -> Path | None:
    panels = {
        "as its users run it": results.timed(f"{model}/peers as run"),
        "same engine": results.timed(f"{model}/peers compiled") or results.timed(f"{model}/peers same engine"),
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        return None
    height = 0.9 + 0.27 * max(map(len, panels.values()))
    figure, axes = new_figure((6.2 * len(panels), height), columns=len(panels))
    for axis, (title, rows) in zip(axes if len(panels) > 1 else [axes], panels.items(), strict=True):
        ratios = [row["vs_floor"] for row in rows]
        colors = [_OURS if row["peer"] == "ours" else _OTHERS for row in rows]
        intervals = [(r["low"], r["high"]) for r in ratios]
        _bars(axis, [label(row) for row in rows], [r["median"] for r in ratios], intervals, colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="time / frozen floor of the same setting")
    figure.suptitle(model)
    return save_figure(figure, path)


def _memory(results: BenchResults, path: Path) -> Path | None:
    cells = [(name.partition("/")[0], cell) for name, cell in results.cells.items() if "first_peak" in cell]
    if not cells:
        return None
    figure, axes = new_figure((8, 0.8 + 0.3 * len(cells)))
    names = [f"{model}: {label(cell)}" for model, cell in cells]
    colors = [_OURS if cell["peer"] == "ours" else _OTHERS for _, cell in cells]
    _bars(axes, names, [largest_peak(cell) / _GB for _, cell in cells], None, colors)
    axes.set(xlabel="GB above the loaded model, the largest of all steps, compiling included")
    return save_figure(figure, path)


def _whole_runs(results: BenchResults, path: Path) -> Path | None:
    runs = [(name.partition("/")[0], cell) for name, cell in results.cells.items() if "/whole run" in name]
    runs = [(model, cell) for model, cell in runs if "seconds" in cell]
    if not runs:
        return None
    figure, axes = new_figure((8, 0.8 + 0.34 * len(runs)))
    colors = [_OURS if cell["peer"] == "ours" else _OTHERS for _, cell in runs]
    names = [f"{model}: {peer_label(cell['peer'])}" for model, cell in runs]
    _bars(axes, names, [cell["seconds"] for _, cell in runs], None, colors)
    axes.set(xlabel="seconds from a loaded model to the adapter, compiling included")
    return save_figure(figure, path)


def _bars(axes, names: Sequence[str], values: Sequence[float], intervals, colors) -> None:
    places = range(len(names))
    axes.barh(places, values, color=colors, alpha=0.6)
    for place, interval in zip(places, intervals or [], strict=False):
        if interval is not None:
            axes.plot(interval, (place, place), color="black", marker="|", linewidth=1)
    # where a bar begins there is neither an interval nor a target
    for place, value in zip(places, values, strict=True):
        text = f"{value:.2f}" if value < 10 else f"{value:.3g}"
        axes.annotate(text, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
