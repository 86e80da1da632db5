"""The command line: `lofit-fast train | sweep | eval | ... | plan | bench | report`, each a thin shell."""

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lofit_fast.cli import plan_commands, select_command
from lofit_fast.cli.select_command import parse_top
from lofit_fast.config import RECIPES, Recipe

# heavy imports happen inside the commands: --help must be instant
app = typer.Typer(
    help="LoFiT: find the attention heads that matter, then tune offsets on those alone.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="What the paths cost, predicted: for timings, make bench.", no_args_is_help=True)
app.add_typer(bench, name="bench")
out, err = Console(), Console(stderr=True)

_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError)

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="smollm2, gemma3-270m, a folder, a .gguf file, or a hub id.", metavar="NAME"),
]
Adapter = Annotated[Path, typer.Option("--adapter", "-a", help="Adapter folder written by train.", metavar="DIR")]
OptionalAdapter = Annotated[
    Path | None, typer.Option("--adapter", "-a", help="Adapter folder; without it, the base model.", metavar="DIR")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", "-t", help="kinship, clutrr, mquake, ... (docs/guide.md). Default: by --data.", metavar="NAME"
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="JSONL of prompt/completion or messages; the folder of a published task.", metavar="PATH"
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _command(*examples: str, to: typer.Typer = app, name: str | None = None) -> Callable:
    """Register a command: its examples go into --help, expected errors become one line and exit code 1."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **options):
            _quiet_libraries()
            try:
                return function(*args, **options)
            except _EXPECTED as error:
                message = " ".join(str(error).split())
                if options.get("as_json"):
                    print(json.dumps({"error": message}))
                else:
                    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
                raise typer.Exit(1) from error

        run.__doc__ = "\n\n".join([function.__doc__, "Examples:", *(f"  lofit-fast {line}" for line in examples)])
        return to.command(name)(run)

    return register


@_command(
    "train --model smollm2 --output runs/kinship",
    "train --model smollm2 --task clutrr --data DIR --train-size 300 --top 0.1 --output runs/clutrr",
    "train --model smollm2 --task truthfulqa --data DIR --top 0.1 --output runs/truthfulqa",
    "train --model meta-llama/Llama-3.2-1B --data my.jsonl --top 32 --output runs/mine",
    "train --model smollm2 --data my.jsonl --min-layer 22 --prefix-cache-gb 2 --output runs/mine",
)
def train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; an interrupted run goes on from it.")],
    task: TaskName = None,
    data: Data = None,
    train_size: Annotated[int | None, typer.Option(help="Use this many training examples.")] = None,
    top: Annotated[str | None, typer.Option(help="Heads to keep: a count (32) or a fraction (0.1).")] = None,
    min_layer: Annotated[int | None, typer.Option(help="Keep heads of this layer and above only.")] = None,
    heads: Annotated[Path | None, typer.Option(help="Skip step 1 and tune the heads of this heads.json.")] = None,
    select_lr: Annotated[float | None, typer.Option(help="Learning rate of step 1.")] = None,
    tune_lr: Annotated[float | None, typer.Option(help="Learning rate of step 2.")] = None,
    l1: Annotated[float | None, typer.Option(help="Weight of the L1 penalty on the scales.")] = None,
    select_epochs: Annotated[int | None, typer.Option(help="Epochs of step 1.")] = None,
    tune_epochs: Annotated[int | None, typer.Option(help="Epochs of step 2.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per optimizer step.")] = None,
    beta: Annotated[float, typer.Option(help="Of DPO, which tasks of preferences (truthfulqa) train with.")] = 0.5,
    accumulation_steps: Annotated[int | None, typer.Option(help="Micro-batches per optimizer step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the data draw, the initial vectors and the order.")] = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attention: Annotated[str, typer.Option(help="auto, eager, sdpa, flash_attention_2, ...")] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the layers. Default: where it pays.")] = None,
    packing: Annotated[bool | None, typer.Option(help="Pack instead of pad. Default: where it pays.")] = None,
    group_by_length: Annotated[bool, typer.Option(help="Draw batches of examples of like length.")] = True,
    prefix_cache_gb: Annotated[
        float, typer.Option(help="Disk for activations below the lowest tuned layer, kept between epochs and runs.")
    ] = 0.0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in --output.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps of each stage: OUTPUT/profile.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run both steps of LoFiT and write the adapter, the heads, the history and two plots."""
    from lofit_fast.evaluation.judge import judge
    from lofit_fast.heads import read_heads
    from lofit_fast.models.load import load_model
    from lofit_fast.training.engine import Engine
    from lofit_fast.training.fit import fit
    from lofit_fast.training.preferences import fit_preferences
    from lofit_fast.training.profiling import ProfileSteps
    from lofit_fast.training.summary import write_summary

    name = _task_name(task, data)
    given = {"select_lr": select_lr, "tune_lr": tune_lr, "l1": l1, "top": None if top is None else parse_top(top)}
    given |= {"select_epochs": select_epochs, "tune_epochs": tune_epochs, "batch_size": batch_size}
    given |= {"accumulation_steps": accumulation_steps, "max_length": max_length, "min_layer": min_layer}
    chosen = {key: value for key, value in given.items() if value is not None}
    recipe = Recipe(**{**RECIPES.get(name, {}), "seed": seed, **chosen})
    knobs = {"compile": compile, "packing": packing}
    knobs = {key: "auto" if value is None else value for key, value in knobs.items()}
    engine = Engine(attention=attention, group_by_length=group_by_length, prefix_cache_gb=prefix_cache_gb, **knobs)
    fixed = None if heads is None else read_heads(heads)
    base, tokenizer = load_model(model, dtype=dtype, device=device)
    examples = _load_task(name, data, tokenizer, train_size=train_size, seed=seed)
    common = {"output_dir": output, "heads": fixed, "resume": resume, "progress": not as_json}
    common["callbacks"] = [ProfileSteps(output)] if profile else ()
    judged = {}
    if examples.preferences:
        # the engine's knobs are of completions
        result = fit_preferences(base, tokenizer, examples.preferences, recipe, beta=beta, **common)
        judged = judge(base, tokenizer, examples, progress=not as_json).metrics if examples.choices else {}
    else:
        result = fit(
            base,
            tokenizer,
            examples.train,
            recipe,
            engine=engine,
            eval_data=examples.validation or None,
            **common,
        )
    summary = write_summary(output, result, model=model, task=examples.name, recipe=recipe, data_seed=seed, **judged)
    _show(summary, as_json, f"{examples.name} on {model}", footer=f"adapter: {output / 'adapter'}")


@_command(
    "sweep grid.toml --output sweeps/mine",
    "sweep grid.toml --output sweeps/mine --jobs 2",
    "sweep grid.toml --output sweeps/mine --dry-run",
)
def sweep(
    grid: Annotated[Path, typer.Argument(help="TOML: [base] for all runs, [grid] of lists, [[runs]].", metavar="FILE")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Sweep folder; finished runs in it are kept.")],
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", help="Processes that train at the same time, each with a base.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep finished runs, go on with interrupted ones.")] = True,
    as_json: Json = False,
) -> None:
    """Run many trainings on one loaded base: every combination of a grid, with a table and a plot at the end.

    A file such as: [base] model = "smollm2", top = 0.1 [grid] seed = [1, 2], tune_lr = [1e-2, 2e-2] (one key a line).
    Runs that differ only in top, min_layer, tune_lr or tune_epochs share one step 1. docs/guide.md has all keys.
    """
    from lofit_fast.training.sweep.grid import read_grid
    from lofit_fast.training.sweep.run import as_table, failures
    from lofit_fast.training.sweep.run import sweep as run_sweep

    plan = read_grid(grid)
    if dry_run:
        rows = [{"name": run.name, **run.varied, "recipe": asdict(run.recipe)} for run in plan.runs]
    else:
        rows = run_sweep(plan, output, jobs=jobs, resume=resume, progress=not as_json)
    if as_json:
        print(json.dumps({"model": plan.model, "task": plan.task, "runs": rows}))
    else:
        out.print(as_table(rows, f"{plan.task} on {plan.model}"))
    if failed := failures(rows):
        if not as_json:
            err.print(Text(f"error: {failed}", "bold red"), soft_wrap=True)
        raise typer.Exit(1)


@_command(
    "eval --model smollm2 --task kinship",
    "eval --model smollm2 --adapter runs/kinship/adapter --task kinship --json",
    "eval --model smollm2 --task truthfulqa --data DIR",
)
def eval(
    model: Model,
    adapter: OptionalAdapter = None,
    task: TaskName = None,
    data: Data = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the data draw. Default: the one the adapter was trained with, else 42.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Exact match of greedy answers, or MC1 and MC2; of a closed set also the best-scoring answer, and the majority."""
    from lofit_fast.evaluation.judge import constrained_accuracy, judge
    from lofit_fast.tasks import majority_accuracy
    from lofit_fast.training.summary import data_seed_of

    base, tokenizer = _load(model, adapter, dtype, device)
    seed = data_seed_of(adapter) if seed is None else seed
    examples = _load_task(_task_name(task, data), data, tokenizer, seed=seed)
    progress = {"progress": not as_json}
    report = {"task": examples.name, "examples": len(examples.choices or examples.validation)}
    report |= judge(base, tokenizer, examples, batch_size=batch_size, **progress).metrics
    if examples.candidates:
        scored = constrained_accuracy(base, tokenizer, examples.validation, examples.candidates, **progress)
        report |= {"best_scoring_candidate": scored, "majority": majority_accuracy(examples)}
    _show(report, as_json, f"{adapter or 'base'} on {model}")


@_command(
    'generate --model smollm2 --adapter runs/kinship/adapter --prompt "Question: ..."',
    "generate --model smollm2 --max-new-tokens 64 < prompts.txt",
)
def generate(
    model: Model,
    adapter: OptionalAdapter = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May be repeated. Default: stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Greedy answers to prompts, one per line of standard input unless given."""
    from lofit_fast.evaluation.judge import generate_answers

    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompt: expected --prompt, or lines on standard input")
    base, tokenizer = _load(model, adapter, dtype, device)
    answers = generate_answers(base, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=not as_json)
    if as_json:
        print(json.dumps([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]))
        return
    for text, answer in zip(prompts, answers, strict=True):
        # not through rich: a model's words are neither wrapped nor searched for markup and emoji
        print(f"{text}\033[1m{answer}\033[0m" if sys.stdout.isatty() else text + answer)


@_command("merge --model smollm2 --adapter runs/kinship/adapter --output merged")
def merge(
    model: Model,
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model.")],
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Write the adapter into the weights: a plain model folder. Not reloaded; `export` also proves the result."""
    from lofit_fast.patching.handle import handle_of
    from lofit_fast.patching.merge import export

    base, tokenizer = _load(model, adapter, dtype, "cpu")
    export(handle_of(base), output, tokenizer)
    _show({"output": str(output)}, as_json, "merged")


@_command("export --model smollm2 --adapter runs/kinship/adapter --output exported")
def export(
    model: Model,
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the exported model.")],
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Merge, write, reload with stock transformers, and compare its logits with the patched model's."""
    from lofit_fast.patching.handle import handle_of
    from lofit_fast.patching.merge import export as export_folder
    from lofit_fast.patching.merge import verify_export

    base, tokenizer = _load(model, adapter, dtype, "cpu")
    export_folder(handle_of(base), output, tokenizer)
    report = verify_export(handle_of(base), output)
    seen = {field.name: getattr(report, field.name) for field in fields(report)}
    _show({"output": str(output), **seen}, as_json, "exported and verified")


def _task_name(task: str | None, data: str | None) -> str:
    return task or ("kinship" if data is None else "completion")


def _load_task(name: str, data: str | None, tokenizer, **options):
    from lofit_fast.tasks import load_task

    return load_task(name, data, tokenizer, **options)


def _load(model: str, adapter: Path | None, dtype: str, device: str):
    from lofit_fast.models.load import load_model
    from lofit_fast.patching.handle import load

    base, tokenizer = load_model(model, dtype=dtype, device=device)
    if adapter is not None:
        load(base, adapter)
    return base, tokenizer


def _show(report: dict, as_json: bool, title: str, footer: str = "") -> None:
    if as_json:
        print(json.dumps(report))
        return
    table = Table("", "", title=title, show_header=False)
    for key, value in report.items():
        if not isinstance(value, list | dict):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    out.print(table)
    if footer:
        out.print(footer, highlight=False)


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_command(
    "select --model smollm2 --task clutrr --data DIR --top 0.1 --output heads.json",
    "select --model smollm2 --method all --top 0.1 --output selections",
)(select_command.select)
_command(
    "plan --model smollm2 --tokens 4096",
    "plan --model Llama-3-8B --tokens 8192 --offset 0.03 --device H100",
)(plan_commands.plan)
_command("autotune --model smollm2 --tokens 1024 --tokens 4096")(plan_commands.autotune)
_command("bench roofline --device H100", to=bench, name="roofline")(plan_commands.bench_roofline)


def main() -> None:
    """The entry point of `lofit-fast`."""
    app()
