"""`make paper`: every cell of the paper's tables and figures that is not there yet, then the report."""

import contextlib
import io
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lofit_fast.cli.command import command

# heavy imports happen inside the command: --help must be instant
OUTPUT = Path("docs/results/paper")


def paper(
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Folder of the tasks' published splits.", metavar="DIR")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: few examples, one seed, no tuning.")] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds of every trained cell. Default: 2, of TruthfulQA 1, of a preset 3.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="May be repeated; the first gets every cell.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "--tasks", "-t", help="clutrr,mquake,truthfulqa, or kinship.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="table1, table2, table3, table5, transfer, layers, sizes, tops, variants, preset, parameters,"
            " combining: some, comma between.",
        ),
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="Take TriviaQA, NQ-open and MMLU from the hub where DIR lacks them.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Default: {OUTPUT}, with --quick {OUTPUT / 'quick'}.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Minutes; no cell is started that may not end in time.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and the estimate, and stop.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of the cells in --output again, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """The paper's tables and figures: every cell one JSON file, finished ones kept, failed ones tried again."""
    from benchmarks.accuracy.session import Session, settings_of
    from benchmarks.accuracy.task_parts import survey

    output = output or (OUTPUT / "quick" if quick else OUTPUT)
    out, err = Console(quiet=as_json), Console(stderr=True, quiet=as_json)
    if report_only:
        said = {"--data": data, "--seeds": seeds, "--model": model, "--task": task, "--only": only, "--hub": hub}
        said |= {"--budget": budget, "--dry-run": dry_run, "--dtype": dtype != "auto", "--device": device != "auto"}
        if idle := [name for name, value in said.items() if value not in (None, False)]:
            raise ValueError(f"--report-only is of the plan in --output, and takes no {', '.join(idle)}")
        path = Session.read(output).report()
        print(json.dumps({"report": str(path)})) if as_json else out.print(f"report: {path}", highlight=False)
        return
    if task is None and data is None:
        task = ["kinship"]
    lists = {"models": model, "tasks": task, "only": only}
    chosen = {key: tuple(",".join(values).split(",")) for key, values in lists.items() if values}
    settings = settings_of(quick, seeds=seeds, **chosen)
    line = _command_line(quick, hub, seeds, chosen)
    session = Session(output, settings, survey(settings.tasks, data, hub), line, dtype=dtype)
    outlook = session.outlook()
    estimate = f"about {outlook['minutes']:.0f} minutes on two slow cores"
    err.print(f"{outlook['cells']} cells, {outlook['to_run']} to run, {estimate}", highlight=False)
    if dry_run:
        names = session.names()
        print(json.dumps({**outlook, "names": names})) if as_json else print("\n".join(names))
        return
    from benchmarks.accuracy.execute import Executor

    # trainers print their metrics; standard output is the report's, or JSON's alone
    with contextlib.redirect_stdout(io.StringIO()):
        execute = Executor(data, output / "work", dtype=dtype, device=device)
        summary = session.run(execute, budget=None if budget is None else 60 * budget, progress=not as_json)
    if as_json:
        print(json.dumps(summary))
    else:
        keys = ("finished", "cells", "run", "late", "waiting")
        out.print(", ".join(f"{key} {summary[key]}" for key in keys), f"\nreport: {summary['report']}", highlight=False)
    if summary["failed"]:
        err.print(f"{len(summary['failed'])} cells failed, see {output / 'summary.json'}", style="red", highlight=False)
        raise typer.Exit(1)


def _command_line(quick: bool, hub: bool, seeds: int | None, chosen: dict[str, tuple[str, ...]]) -> str:
    """The command that makes the same cells, without the folders of this machine."""
    words = ["python -m benchmarks.accuracy --data DIR"] + ["--quick"] * quick + ["--hub"] * hub
    if seeds is not None:
        words.append(f"--seeds {seeds}")
    flags = {"models": "--model", "tasks": "--tasks", "only": "--only"}
    return " ".join(words + [f"{flags[key]} {','.join(values)}" for key, values in chosen.items()])


app = typer.Typer(pretty_exceptions_enable=False)
command(
    app,
    "--data DIR --model smollm2,gemma3-270m --tasks mquake,clutrr,truthfulqa",
    "--data DIR --only table1 --tasks clutrr --output runs/table1 --budget 60",
    "--data DIR --quick --dry-run",
    "--report-only",
    program="python -m benchmarks.accuracy",
    goes_on=True,
)(paper)

if __name__ == "__main__":
    app()
