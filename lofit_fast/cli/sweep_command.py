"""The command `sweep`: many trainings on one loaded base."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.command import out, say_error
from lofit_fast.cli.options import Fast, Jobs, Json, Together, check_idle, check_output, named_path

# heavy imports happen inside the command: --help must be instant


def sweep(
    grid: Annotated[
        Path,
        typer.Argument(parser=named_path, help="TOML: [base] for all runs, [grid] of lists, [[runs]].", metavar="FILE"),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=named_path,
            help="Sweep folder; finished runs in it are kept. Required without --dry-run.",
            metavar="DIR",
        ),
    ] = None,
    jobs: Jobs = 1,
    devices: Annotated[
        str | None,
        typer.Option(
            help="0,1,2,3 or cuda:0,cuda:1 or cpu,cpu: a process for each, all taking runs from one queue. A device "
            "named twice has two.",
            metavar="LIST",
        ),
    ] = None,
    together: Together = 1,
    fast: Fast = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep finished runs, go on with interrupted ones.")] = True,
    as_json: Json = False,
) -> None:
    """Run many trainings on one loaded base: every combination of a grid, with a table and a plot at the end.

    A file such as: [base] model = "smollm2", top = 0.1 [grid] seed = [1, 2], tune_lr = [1e-2, 2e-2] (one key a line).
    Runs that differ only in what their scores of heads do not depend on (top, tune_lr, ...) share one step 1.
    The same command may run several times at once, on any machines that share the folder, by itself, under torchrun or
    in a SLURM array: each run is trained once, and the run of a process that dies is taken up by another.
    docs/guide.md has all keys, docs/scaling_out.md the clusters.
    """
    from lofit_fast.files import as_json as plain
    from lofit_fast.training.sweep.grid import read_grid
    from lofit_fast.training.sweep.launched import launched
    from lofit_fast.training.sweep.run import checked_workers
    from lofit_fast.training.sweep.run import sweep as run_sweep
    from lofit_fast.training.sweep.sweep_tables import as_table, failures

    check_output(output, dry_run)
    plan = read_grid(grid, fast)
    if dry_run:
        check_idle("--dry-run lists the runs", {"--no-resume": not resume})
        checked_workers(plan, None, jobs, devices, together, launched())
        rows = plain([{"name": run.name, **run.varied, "recipe": asdict(run.recipe)} for run in plan.runs])
    else:
        how = {"jobs": jobs, "devices": devices, "together": together, "resume": resume}
        rows = run_sweep(plan, output, **how, progress=not as_json)
    if as_json:
        print(json.dumps({"model": plan.model, "task": plan.task, "runs": rows}))
    else:
        out.print(as_table(rows, f"{plan.task} on {plan.model}"))
    if failed := failures(rows):
        if not as_json:
            say_error(failed)
        raise typer.Exit(1)
