"""The benchmark's report: one HTML page that needs nothing else, its pictures as PNG, and a Markdown table."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.speed.cells import RESULTS
from benchmarks.speed.charts import draw_all
from benchmarks.speed.results import ELSEWHERE, BenchResults, Target, label, peer_label
from benchmarks.speed.timing import bracket
from lofit_fast.files import whole_folder
from lofit_fast.plots import picture_html

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:.25em .8em;text-align:left}
img{max-width:100%}.met{color:#176b2c}.missed{color:#a61b1b}code{background:#f3f3f3}"""


def write_report(results: Path | str, output: Path | str) -> Path:
    """Read a results folder, write index.html, table.md and the pictures into output. Returns the page's path.

    Raises FileNotFoundError or ValueError for a folder without readable results, OSError for an output folder that
    cannot be written.
    """
    read = BenchResults.read(results)
    with whole_folder(output) as scratch:
        pictures = draw_all(read, scratch)
        (scratch / "index.html").write_text(_page(read, pictures))
        (scratch / "table.md").write_text(markdown_table(read))
    return Path(output) / "index.html"


def markdown_table(results: BenchResults) -> str:
    """The promised ratios as a Markdown table, with what kind of evidence it is and where it comes from."""
    lines = ["| | " + " | ".join(results.models()) + " | target |", "|---" * (len(results.models()) + 2) + "|"]
    targets = results.targets()
    for words in dict.fromkeys(row.words for row in targets):
        rows = {row.model: row for row in targets if row.words == words}
        cells = [_measured(rows[m]) if m in rows else "-" for m in results.models()]
        bounds = [_bound(rows[m]) if m in rows else "-" for m in results.models()]
        lines.append(f"| {words} | {' | '.join(cells)} | {' / '.join(bounds)} |")
    return "\n".join([*lines, "", _provenance(results), ""])


def _page(results: BenchResults, pictures: dict[str, Path]) -> str:
    targets = [(t.model, t.words, _measured(t), _bound(t), t.verdict) for t in results.targets()]
    body = [
        f"<h1>lofit-fast: benchmark</h1><p>{html.escape(_provenance(results))}</p>",
        _reading(),
        _section("Targets", ("model", "ratio", "measured", "target", ""), targets),
        *(picture_html(title, path) for title, path in pictures.items()),
        _profiles(results),
        _losses(results),
        _generation(results),
        _warm(results),
        _ops(results),
        _layers(results),
        _missing(results),
    ]
    head = f'<meta charset="utf-8"><title>lofit-fast: benchmark</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(body)}</html>\n'


def _reading() -> str:
    return (
        "<p>A ratio is the median over interleaved pairs of rounds on the same examples. Its bracket is the 95 % "
        "bootstrap interval from 6 rounds on, and the range of fewer rounds, which it then names. A target is met, or "
        "missed, where all of the bracket says so; else it is not decided. Of the two rows "
        "(step 1: scales on all heads; step 2: offsets on 10 % of the heads, layer 0 among "
        "them) the worse one is shown. <em>As its users run it</em>: full logits, right padding, unsorted batches of "
        "8, sdpa attention, AdamW. <em>Same engine</em>: everything of ours around it, only the adapter differs; on a "
        "CPU that is packed rows, compiled layers and a heap held in large pages. Each row has a process of its own, "
        "and waits while the others have their turn: what frees and allocates pages in every step, as hooks and "
        "LoRA do, is slower for it than alone. "
        "<em>Frozen floor</em>: no adapter, backward down to the same lowest layer, no optimizer. No peer is timed "
        "before its loss is right. <em>Memory</em> is the largest of all steps that were taken, compiling included.</p>"
    )


def _profiles(results: BenchResults) -> str:
    rows = []
    for model in results.models():
        for step in (results.cell(f"{model}/profile") or {}).get("steps", []):
            whole = sum(step["kinds"].values())
            shares = sorted(step["kinds"].items(), key=lambda item: -item[1])
            rows.append((model, step["row"], ", ".join(f"{kind} {spent / whole:.0%}" for kind, spent in shares)))
    return _section("Where the time of our step goes", ("model", "step", "share of a warm step, profiled"), rows)


def _losses(results: BenchResults) -> str:
    rows = [
        (
            name.partition("/")[0],
            cell["dtype"],
            "; ".join(f"{who}: {' '.join(f'{x:.4f}' for x in losses)}" for who, losses in cell["losses"].items()),
            f"{cell['difference']:.2%}",
            f"{cell['order_difference']:.2%}",
        )
        for name, cell in results.cells.items()
        if "/losses" in name and "losses" in cell
    ]
    heads = ("model", "dtype", "mean loss per epoch", "ours against the hook, same batches", "hook, another order")
    return _section("Losses, every accelerator on", heads, rows)


def _generation(results: BenchResults) -> str:
    rows = []
    for name, cell in results.cells.items():
        if not name.endswith("/generation"):
            continue
        for row in cell.get("rows", []):
            times = cell["against_ours"].get(row["peer"])
            times = _with_bracket(times, len(row["seconds"])) if times else ""
            median = f"{statistics.median(row['seconds']):.2f} s"
            rows.append((name.partition("/")[0], label(row), row["setting"], median, times))
    heads = ("model", "method", "setting", "median", "/ lofit-fast")
    return _section("Generation, 16 tokens for 16 prompts", heads, rows)


def _warm(results: BenchResults) -> str:
    rows = [
        (name, f"{label(row)}, {row['setting']}", f"{row['warm_seconds']:.1f} s")
        for name, cell in results.cells.items()
        for row in cell.get("rows", [])
        if "warm_seconds" in row and row["peer"] in ("ours", "floor", "compiled_hook", "off", "on")
    ]
    return _section("Before the first round: checking, compiling and a first pass", ("cell", "row", "seconds"), rows)


def _ops(results: BenchResults) -> str:
    benchmarks = (results.cell("ops") or {}).get("benchmarks", [])
    rows = [(one["group"], one["name"], f"{1e3 * one['seconds']['median']:.3f} ms") for one in benchmarks]
    return _section("Ops", ("group", "benchmark", "median"), rows)


def _layers(results: BenchResults) -> str:
    cell = results.cell("layers") or {"groups": []}
    rows = []
    for group in cell["groups"]:
        where = f"{group['level']} of {group['model']}, {group['setting']}, T = {group['T']}, {group['dtype']}"
        for name, one in group["peers"].items():
            times = _with_bracket(one["vs_floor"], one["rounds"]) if "vs_floor" in one else ""
            rows.append((where, peer_label(name), f"{one['ms']:.2f} ms", times))
    return _section("Layers", ("what", "peer", "median", "/ floor"), rows)


def _missing(results: BenchResults) -> str:
    return _section("Not measured", ("what", "why"), results.missing())


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<h2>{html.escape(title)}</h2>{_table(heads, rows)}" if rows else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        mark = f' class="{text}"' if text in ("met", "missed") else ""
        return f"<td{mark}>{html.escape(text)}</td>"

    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _measured(target: Target) -> str:
    if target.value is None:
        return "not measured"
    interval = "" if target.interval is None else f" {bracket(*target.interval, target.rounds)}"
    of_machine = f" [{target.elsewhere}]" if target.elsewhere else ""
    return f"{target.value:.2f}{interval}{of_machine}"


def _with_bracket(made: dict, rounds: int) -> str:
    return f"{made['median']:.2f} {bracket(made['low'], made['high'], rounds)}"


def _bound(target: Target) -> str:
    return "-" if target.bound is None else f"{target.bound:g} or {'more' if target.at_least else 'less'}"


def _provenance(results: BenchResults) -> str:
    meta = results.summary["meta"]
    others = [f"[{name}]: {_machine(other)}." for name, other in meta.get(ELSEWHERE, {}).items()]
    return " ".join([f"Evidence: {_machine(meta)}.", *others])


def _machine(meta: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
    where = meta["device"] if meta["device"] != "cpu" else f"{meta['processor']}, {meta['threads']} threads"
    commit = f"commit {(meta['commit'] or 'unknown')[:12]}{' with changes' if meta.get('dirty') else ''}"
    return f"{meta['evidence']}, one machine ({where}), {meta['data']} examples, {commit}; {versions}"


def main(
    results: Annotated[Path, typer.Argument(help="Folder with the summary.json of make bench.")] = RESULTS,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the page.")] = Path("runs/report"),
) -> None:
    """Benchmark results as one HTML page, PNGs and a Markdown table."""
    print(f"wrote {write_report(results, output)} and table.md beside it")


if __name__ == "__main__":
    typer.run(main)
