"""The command `train`: both steps of LoFiT on a task or on data of one's own."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.command import show
from lofit_fast.cli.dry_run_report import show_dry_run
from lofit_fast.cli.options import (
    L1,
    AccumulationSteps,
    BatchSize,
    Columns,
    Data,
    Device,
    Dtype,
    Fast,
    Json,
    MaxLength,
    MinLayer,
    Model,
    Positions,
    Seed,
    Select,
    SelectEpochs,
    SelectExamples,
    SelectLr,
    Split,
    Subset,
    TaskName,
    TensorParallel,
    Top,
    TrainOn,
    TrainSize,
    TuneEpochs,
    check_idle,
    check_output,
    flags_of,
    named_path,
    parse_gb,
    reading_of,
    recipe_of,
    task_name,
)

# heavy imports happen inside the command: --help must be instant


def train(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=named_path,
            help="Run folder; an interrupted run goes on from it. Required without --dry-run.",
            metavar="DIR",
        ),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = None,
    columns: Columns = None,
    train_on: TrainOn = None,
    train_size: TrainSize = None,
    top: Top = None,
    min_layer: MinLayer = None,
    heads: Annotated[
        str | None, typer.Option(help="Skip step 1 and tune the heads of this heads.json, or all.", metavar="FILE|all")
    ] = None,
    fast: Fast = False,
    select: Select = None,
    select_examples: SelectExamples = None,
    select_lr: SelectLr = None,
    tune_lr: Annotated[float | None, typer.Option(help="Learning rate of step 2.")] = None,
    tune_scales: Annotated[
        bool, typer.Option("--tune-scales", help="Train scales beside offsets in step 2. The paper: offsets alone.")
    ] = False,
    l1: L1 = None,
    select_epochs: SelectEpochs = None,
    tune_epochs: TuneEpochs = None,
    batch_size: BatchSize = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Of DPO, for preferences (truthfulqa, or prompt/chosen/rejected). Default: 0.5."),
    ] = None,
    accumulation_steps: AccumulationSteps = None,
    max_length: MaxLength = None,
    positions: Positions = None,
    seed: Seed = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tensor_parallel: TensorParallel = False,
    attention: Annotated[str, typer.Option(help="auto, eager, sdpa, flash_attention_2, ...")] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the layers. Default: where it pays.")] = None,
    packing: Annotated[bool | None, typer.Option(help="Pack instead of pad. Default: where it pays.")] = None,
    group_by_length: Annotated[bool, typer.Option(help="Draw batches of examples of like length.")] = True,
    prefix_cache_gb: Annotated[
        str | None,
        typer.Option(
            help="Disk for activations below the lowest tuned layer, kept between epochs and runs, in GB, or 'auto': "
            "up to a tenth of the disk's room where it pays. Default: 0.",
            metavar="GB",
        ),
    ] = None,
    frozen_products: Annotated[
        str | None,
        typer.Option(
            help="How products with frozen weights are computed in training: full, int8, fp8 (GPUs), or auto. Other "
            "than full is faster, and changes results a little (docs/frozen_products.md). Default: full."
        ),
    ] = None,
    prompt_cache_gb: Annotated[
        float | None,
        typer.Option(help="With --positions answer: disk for prompts' keys and values. Default: 16; 0 keeps none."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare LoFiT's fused layers with plain products on the first batch of every shape. Where they "
            "differ by more than rounding, go on with plain ones and say so.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in --output.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps of each stage: OUTPUT/profile.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show three encoded examples, the numbers and the engine; train and write nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run both steps of LoFiT and write the adapter, the heads, the history and two plots."""
    from lofit_fast.config import OF_CHOICE, check_choice
    from lofit_fast.evaluation.judge import judge
    from lofit_fast.heads import heads_asked
    from lofit_fast.models.load import load_model
    from lofit_fast.ranks import together, told
    from lofit_fast.tasks import load_task
    from lofit_fast.training.engine import Engine
    from lofit_fast.training.fit import fit_objective
    from lofit_fast.training.objectives import Preferences, objective_of
    from lofit_fast.training.profiling import ProfileSteps
    from lofit_fast.training.run_folder import dtype_of_run, held
    from lofit_fast.training.run_source import source_of
    from lofit_fast.training.summary import short_digest, write_summary

    check_output(output, dry_run)
    if dry_run:
        check_idle("--dry-run trains nothing", {"--profile": profile})
    name = task_name(task, data)
    numbers = {"select_lr": select_lr, "tune_lr": tune_lr, "l1": l1, "min_layer": min_layer, "max_length": max_length}
    numbers |= {"select_epochs": select_epochs, "tune_epochs": tune_epochs, "batch_size": batch_size}
    numbers |= {"accumulation_steps": accumulation_steps, "select": select, "select_examples": select_examples}
    numbers |= {"positions": positions, "tune_scales": tune_scales or None}
    recipe = recipe_of(name, seed, top, fast, **numbers)
    # batches and positions are of step 2 too
    of_choice = flags_of({key: value for key, value in {"top": top, **numbers}.items() if key in OF_CHOICE})
    check_choice(of_choice, [recipe.select], None if heads is None else "--heads")
    disk = None if prefix_cache_gb is None else parse_gb(prefix_cache_gb)
    knobs = {"compile": compile, "packing": packing, "frozen_products": frozen_products}
    knobs |= {"prefix_cache_gb": disk, "prompt_cache_gb": prompt_cache_gb, "verify": verify or None}
    knobs = {key: value for key, value in knobs.items() if value is not None}
    engine = (Engine.fast if fast else Engine)(attention=attention, group_by_length=group_by_length, **knobs)
    reading = reading_of(split, subset, columns, train_on)
    fixed = None if heads is None else heads_asked(heads)
    if dtype == "auto" and resume and output is not None:
        # a run goes on in the dtype that it was begun in
        dtype = told(lambda: dtype_of_run(output)) or dtype
    with together("loading the model"):
        base, tokenizer = load_model(model, dtype=dtype, device=device, tensor_parallel=tensor_parallel)
    with together("reading the data"):
        examples = load_task(name, data, tokenizer, train_size=train_size, seed=seed, progress=not as_json, **reading)
    objective = objective_of(examples)
    if isinstance(objective, Preferences):
        objective = replace(objective, beta=Preferences.beta if beta is None else beta)
    elif beta is not None:
        raise ValueError(f"--beta is of DPO, which the task {name} does not train with")
    if dry_run:
        show_dry_run(
            base, tokenizer, examples, objective, recipe, engine, fixed, as_json, f"{examples.name} on {model}"
        )
        return
    how = {"engine": engine, "heads": fixed, "resume": resume, "progress": not as_json}
    how["source"] = source_of(examples, data, seed)
    how["callbacks"] = [ProfileSteps(output)] if profile else ()
    result = fit_objective(base, tokenizer, objective, recipe, output_dir=output, **how)
    judged = judge(base, tokenizer, examples, progress=not as_json).metrics if examples.choices else {}

    def summed_up() -> dict:
        about = {"model": model, "task": examples.name, "recipe": recipe, "data_seed": seed}
        about |= {"data": data, "train_size": train_size}
        with held(output):
            return write_summary(output, result, **about, **judged)

    summary = told(summed_up)
    footer = f"adapter: {output / 'adapter'}, digest {short_digest(summary)}"
    show(summary, as_json, f"{examples.name} on {model}", footer=footer)
