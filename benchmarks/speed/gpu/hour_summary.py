"""The hour's summary: what was measured beside what the roofline predicted, the largest misses, and what is red."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.gpu import device_answers, hour_predictions
from benchmarks.speed.gpu.gpu_report import REHEARSED
from benchmarks.speed.gpu.gpu_session import reds
from benchmarks.speed.gpu.hour_predictions import Compared

MISSES = 3
_OP_PARTS = ("op", "op-more")
# why a row has no time, in the order of how bad it is
_WHY = ("red", "error", "skipped", "absent")


def write(report: dict[str, Any], folder: Path) -> str:
    """Writes summary.md and summary.json, and answers.json where there are answers. Returns what was written."""
    found = summary(report)
    files = {"summary.json": json.dumps(found, indent=1) + "\n", "summary.md": markdown(found)}
    cases = report["parts"].get("autotune", {}).get("cases", {})
    rows = [case["row"] for case in cases.values() if "row" in case]
    if rows:
        name = next(case["device_name"] for case in cases.values() if "row" in case)
        files["answers.json"] = json.dumps(device_answers.answers_file_content(name, rows), indent=2) + "\n"
    for name, text in files.items():
        (folder / name).write_text(text)
    return f"written: hour.json, {', '.join(files)} in {folder}"


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """All that summary.md shows, as plain data."""
    rehearsal, parts = report["evidence"] == REHEARSED, report["parts"]
    device = hour_predictions.device_of(report["machine"]["device"], rehearsal)
    timed = [row for name in _OP_PARTS for row in parts.get(name, {}).get("rows", [])]
    compared = [] if device is None else list(hour_predictions.compared_rows(timed, device))
    groups = list(parts.get("steps", {}).get("groups", {}).values())
    added = (
        [] if device is None else [row for group in groups for row in hour_predictions.added_to_a_step(group, device)]
    )
    return {
        "evidence": report["evidence"],
        "machine": report["machine"],
        "roofline": None if device is None else device.name,
        "parts": {name: {key: data[key] for key in ("finished", "seconds")} for name, data in parts.items()},
        "faults": faults(report),
        "projections": [row.as_dict() for row in compared],
        "misses": [row.as_dict() | {"seen": _seen(row, compared)} for row in largest_misses(compared)],
        "layers": parts.get("layer", {}).get("rows", []),
        "steps": groups,
        "added": added,
        "profile": list(parts.get("profile", {}).get("groups", {}).values()),
        "tests": {key: value for key, value in parts.get("tests", {}).items() if key not in ("finished", "seconds")},
    }


def largest_misses(compared: Sequence[Compared]) -> list[Compared]:
    """The rows whose ratio to the floor the roofline predicted worst, the worst first, at most one of each peer's."""
    worst: dict[str, Compared] = {}
    for row in sorted(compared, key=lambda row: -row.miss):
        if row.peer != "floor":
            worst.setdefault(row.peer, row)
    return list(worst.values())[:MISSES]


def _seen(row: Compared, compared: Sequence[Compared]) -> list[str]:
    """What the numbers say about a miss, for whoever looks for its cause."""
    floor = next((one for one in compared if one.row == row.row and one.peer == "floor"), None)
    found = [f"{row.measured_ms:.3f} ms measured, {row.predicted_ms:.3f} ms predicted, {row.kernels} kernels counted"]
    if floor is not None:
        found.append(f"the floor took {floor.measured_ms / floor.predicted_ms:.2f} times its prediction")
    if row.launch_bound:
        found.append("more than half of the prediction is the assumed shortest time of a kernel")
    if row.host_ms > row.measured_ms:
        found.append(f"the host took {row.host_ms:.3f} ms to launch it: longer than the device to run it")
    return found


def faults(report: dict[str, Any]) -> list[str]:
    """Everything that is red, crashed, hung or failed, a line each."""
    found = [f"check, {name}: {why}" for name, why in reds(report.get("checks", {})).items()]
    parts = report["parts"]
    for part in (*_OP_PARTS, "layer"):
        for row in parts.get(part, {}).get("rows", []):
            where = f"{part}, {row['model']} {row['setting']} T={row['T']}"
            found += _errors(where, row)
            found += [line for who, one in row.get("peers", {}).items() for line in _errors(f"{where}, {who}", one)]
    for part in ("steps", "profile"):
        for name, group in parts.get(part, {}).get("groups", {}).items():
            found += [f"{part}, {name}, {line}" for line in _faults_of(group)]
    for name, case in parts.get("autotune", {}).get("cases", {}).items():
        found += _errors(f"autotune, {name}", case)
        refused = case.get("row", {}).get("refused", {})
        found += [f"autotune, {name}, {path}: {why}" for path, why in refused.items()]
    tests = parts.get("tests", {})
    found += [f"tests, {line}" for line in tests.get("failed", [])]
    # tests that could not even be collected
    return found + ([f"tests: {tests['said']}"] if "said" in tests else [])


def _errors(where: str, row: dict[str, Any]) -> list[str]:
    return [f"{where}: {row[key]}" for key in ("red", "error") if key in row]


def _faults_of(group: dict[str, Any]) -> list[str]:
    found = _errors("all rows", group)
    for row in group.get("rows", []):
        found += _errors(f"{row['peer']}, {row['setting']}", row)
    return found + [f"{who}: {why}" for who, why in group.get("fallen", {}).items()]


def markdown(found: dict[str, Any]) -> str:
    """The summary for people."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {there}" for name, there in machine["versions"].items() if there)
    dirty = " (with changes)" if machine["dirty"] else ""
    lines = [f"# {machine['device']}: {found['evidence']}", "", f"{versions}; commit {machine['commit']}{dirty}.", ""]
    lines += _table(
        ("part", "finished", "seconds"),
        [(name, "yes" if one["finished"] else "no", f"{one['seconds']:.0f}") for name, one in found["parts"].items()],
    )
    sections = {
        "Red, crashed, hung or failed": [f"- {line.splitlines()[0][:300]}" for line in found["faults"]] or ["Nothing."],
        "One projection: measured and predicted": _projections(found),
        f"The {MISSES} largest misses of the roofline": _misses(found),
        "One decoder layer": _layers(found["layers"]),
        "Whole training steps": _steps(found["steps"]),
        "What LoFiT adds to a round of steps": _added(found["added"]),
        "Profile of a step": _profile(found["profile"]),
        "Tests": [json.dumps(found["tests"].get("counts", found["tests"].get("absent", "not run")))],
    }
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _projections(found: dict[str, Any]) -> list[str]:
    if found["roofline"] is None:
        return ["The roofline has no row for this device: the times are in hour.json."]
    intro = f"Forward and backward, times the floor; predicted with the roofline's row of {found['roofline']}."
    rows = [
        (
            one["row"],
            one["peer"],
            f"{one['measured']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
            f"{one['predicted']:.3f}",
            f"{one['measured'] / one['predicted']:.2f}",
            f"{one['measured_ms']:.3f}",
            f"{one['predicted_ms']:.3f}",
            f"{one['host_ms']:.3f}",
        )
        for one in found["projections"]
    ]
    heads = ("row", "who", "measured", "predicted", "measured / predicted", "ms", "predicted ms", "host ms")
    return [intro, "", *_table(heads, rows)]


def _misses(found: dict[str, Any]) -> list[str]:
    lines = []
    for one in found["misses"]:
        lines.append(
            f"- {one['row']}, {one['peer']}: measured {one['measured']:.3f}, predicted {one['predicted']:.3f}."
        )
        lines += [f"  {line[0].upper()}{line[1:]}." for line in one["seen"]]
    return lines or ["Nothing was compared."]


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    table = []
    for row in rows:
        for name, one in row.get("peers", {}).items():
            why = next((one[key] for key in _WHY if key in one), None)
            times = one.get("vs_floor", {"median": float("nan")})
            cells = (f"{one['ms']:.3f}", f"{times['median']:.3f}") if why is None else (why.splitlines()[0][:80], "")
            table.append((f"{row['model']} {row['setting']} T={row['T']}", name, *cells))
    return _table(("row", "who", "ms", "times the floor"), table)


def _steps(groups: list[dict[str, Any]]) -> list[str]:
    lines = ["Random weights, bfloat16. A ratio is to the row's own setting. Peak: above the weights.", ""]
    table = []
    for group in groups:
        for row in group.get("rows", []):
            name = f"{group['model']} ({group['layers']} of {group['of_layers']} layers), {group['step']}"
            why = next((row[key] for key in _WHY if key in row), None)
            if why is not None:
                table.append((name, row["peer"], row["setting"], str(why).splitlines()[0][:80], "", "", "", ""))
                continue
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
            ratios = [f"{row[key]['median']:.3f}" if key in row else "" for key in ("vs_floor", "vs_hook")]
            loss = f"{row['check']['loss']:.4f} (+- {row['check']['tolerance']:.4f})"
            table.append((name, row["peer"], row["setting"], f"{row['tokens_per_s']:.0f}", *ratios, peak, loss))
    heads = ("model", "who", "setting", "tokens/s", "times the floor", "times the hook", "peak GiB", "loss checked")
    return lines + _table(heads, table)


def _added(rows: list[dict[str, Any]]) -> list[str]:
    table = [
        (f"{row['model']}, {row['step']}", row["peer"], row["setting"])
        + (f"{row['measured_ms']:.2f}", f"{row['predicted_ms']:.2f}")
        for row in rows
    ]
    return _table(("model", "who", "setting", "ms above the floor", "predicted"), table)


def _profile(groups: list[dict[str, Any]]) -> list[str]:
    counts = ("kernels", "launches", "synchronisations", "copies to the host", "allocations", "operations")
    table = []
    for group in groups:
        for row in group.get("rows", []):
            idle = row.get("idle")
            cells = [f"{row[key]:.1f}" if row.get(key) is not None else "" for key in counts]
            cells.append(f"{idle['idle_ms']:.2f} of {idle['idle_ms'] + idle['busy_ms']:.2f}" if idle else "")
            table.append((f"{group['model']}, {group['step']}", row["peer"], row["setting"], *cells))
    return _table(("model", "who", "setting", *counts, "idle ms"), table)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["Nothing was measured."]
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
