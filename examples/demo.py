"""The demo, `make demo`: a real model learns family relations through a few attention heads, in a few minutes."""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from benchmarks.peers.hook import HookLofit, vectors_of
from lofit_fast.config import Recipe
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.evaluation.judge import exact_match_accuracy, generate_answers
from lofit_fast.models.load import load_model
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.tasks import majority_accuracy
from lofit_fast.tasks.kinship import kinship
from lofit_fast.training.fit import fit, select_by_training
from lofit_fast.training.objectives import Completions
from lofit_fast.training.summary import write_summary

# generated stories cost nothing, so few passes over many; more heads than for a 7B model, as the guide says. A third of
# them is enough to rank heads by
RECIPE = Recipe(select_epochs=1, tune_epochs=2, batch_size=4, tune_lr=5e-2, top=0.3)
SELECT_SHARE = 0.36
DATA_SEED = 0
_TIMED_BATCHES = 3
_STAGES = {"select": "step 1: scales on every head", "tune": "step 2: offsets on the best heads"}


def run_demo(folder: Path, model_name: str, train_size: int, validation_size: int, console: Console) -> dict:
    """Judge, select, tune, judge, time, merge. Returns the summary.

    The accuracy is measured on stories whose names and sentences do not occur in training, labels balanced. Writes the
    run folder, with summary.json and two pictures.
    """
    started = time.perf_counter()
    console.rule(f"LoFiT on {model_name}")
    with console.status("loading the model"):
        model, tokenizer = load_model(model_name)
    task = kinship(train_size, validation_size, DATA_SEED)
    console.print(f"task: {len(task.train)} family stories, judged on {len(task.validation)} others. For example")
    console.print(f"  {task.validation[0].prompt}[bold]{task.validation[0].completion}[/]", highlight=False)
    with console.status(f"asking the untrained model {len(task.validation)} questions"):
        before = exact_match_accuracy(model, tokenizer, task.validation)
        question = task.validation[0].prompt
        answer_before = generate_answers(model, tokenizer, [question])[0]
    console.print(f"before training: {_percent(before)} exact match")
    with _bar(console) as bar:
        how = {"callbacks": [StageBar(bar)], "resume": False, "progress": False}
        few = Completions(task.train[: round(SELECT_SHARE * len(task.train))])
        ranked = select_by_training(model, tokenizer, few, RECIPE, output_dir=folder / "step1", **how)
        result = fit(model, tokenizer, task.train, RECIPE, output_dir=folder, heads=ranked.heads, **how)
        of_both = {"metrics": ranked.metrics | result.metrics, "history": [*ranked.history, *result.history]}
        result = replace(result, scores=ranked.scores, **of_both)
    console.print(f"kept {len(result.heads)} heads; best: {result.heads[:6]}", highlight=False)
    with console.status(f"asking the tuned model {len(task.validation)} questions"):
        after = exact_match_accuracy(model, tokenizer, task.validation)
    console.print(f"after training: {_percent(after)} exact match")
    with console.status("timing a training step against hooks"):
        speed = time_against_hook(result.handle, tokenizer, task.train)
        merged = result.handle.merge()
        answer_after = generate_answers(merged, tokenizer, [question])[0]
    summary = write_summary(
        folder,
        result,
        model=model_name,
        task=task.name,
        recipe=RECIPE,
        data_seed=DATA_SEED,
        accuracy_before=before,
        accuracy_majority=majority_accuracy(task),
        accuracy_after_tune=after,
        question=question,
        answer_before=answer_before.strip(),
        answer_after=answer_after.strip(),
        **speed,
        seconds_in_all=time.perf_counter() - started,
    )
    console.print(_table(summary))
    console.print(f"pictures: {folder}/heads.png, {folder}/loss.png", highlight=False)
    console.print("to try next:", highlight=False)
    for command in _next_commands(model_name, folder, question):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    return summary


class StageBar(TrainerCallback):
    """One bar per step of LoFiT: optimizer steps done, and the loss."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_train_begin(self, args, state, control, **_):
        """A step of LoFiT begins."""
        self.task = self.bar.add_task(_STAGES[Path(args.output_dir).name], total=state.max_steps)

    def on_step_end(self, args, state, control, **_):
        """One optimizer step more."""
        self.bar.update(self.task, completed=state.global_step)


def time_against_hook(handle: LofitHandle, tokenizer, examples) -> dict[str, float]:
    """Training tokens/s of step 2, ours and a hook's on the same batches and heads, taken in turns; medians.

    hook_tokens_per_s: as its users run it, with full logits and sdpa attention. hook_same_engine_tokens_per_s: with our
    attention and labelled logits, where only the adapter differs. ours: uncompiled and unpacked, as the hook is.
    """
    collate = CompletionCollator(pad_token_id(tokenizer))
    rows = [encode(tokenizer, example, None) for example in examples]
    batches = [collate(rows[i : i + 8]) for i in range(0, min(len(rows), 8 * _TIMED_BATCHES), 8)]
    model, parameters = handle.model, list(handle.parameters())
    seconds: dict[str, list[float]] = {"ours": [], "hook_same_engine": [], "hook": []}
    for batch in [batches[0], *batches]:
        seconds["ours"].append(_step_seconds(model, batch, parameters))
        with handle.disabled():
            hook = HookLofit(model, vectors_of(handle))
            try:
                leaves = list(hook.parameters.values())
                seconds["hook_same_engine"].append(_step_seconds(model, batch, leaves))
                full = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
                seconds["hook"].append(_step_seconds(model, full, leaves))
            finally:
                hook.remove()
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    # the first round warms up
    rates = {name: median(n / s for n, s in zip(tokens, taken[1:], strict=True)) for name, taken in seconds.items()}
    return {
        "step_tokens_per_s": rates["ours"],
        "hook_tokens_per_s": rates["hook"],
        "hook_same_engine_tokens_per_s": rates["hook_same_engine"],
    }


def _step_seconds(model, batch: dict, parameters: list[torch.Tensor]) -> float:
    """Forward and backward of one batch."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    _synchronize(device)
    started = time.perf_counter()
    loss = model(**batch, use_cache=False).loss
    torch.autograd.grad(loss, parameters)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:36}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    return Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(summary: dict) -> Table:
    accuracy = {
        "before": "accuracy_before",
        "always the commonest relation": "accuracy_majority",
        f"after, offsets on {summary['n_heads']} heads": "accuracy_after_tune",
    }
    table = Table("", "", title=f"{summary['model']} on {summary['task']}", show_header=False)
    for label, key in accuracy.items():
        table.add_row(label, _percent(summary[key]))
    table.add_section()
    table.add_row("trained numbers", f"{summary['trainable_parameters']:,}")
    table.add_row("training, whole step 2", f"{summary['tokens_per_s']:.0f} tokens/s")
    table.add_row("one step, ours", f"{summary['step_tokens_per_s']:.0f} tokens/s")
    table.add_row("one step, hooks as their users run them", f"{summary['hook_tokens_per_s']:.0f} tokens/s")
    table.add_row(
        "one step, hooks with labelled logits too", f"{summary['hook_same_engine_tokens_per_s']:.0f} tokens/s"
    )
    table.add_row("everything above", f"{summary['seconds_in_all']:.0f} s")
    table.add_section()
    table.add_row("the merged model, before", summary["answer_before"] or "(nothing)")
    table.add_row("the merged model, after", summary["answer_after"])
    return table


def _next_commands(model: str, folder: Path, question: str) -> list[str]:
    program = ".venv/bin/lofit-fast"
    adapter = f"--model {model} --adapter {folder}/adapter"
    return [
        f"{program} generate {adapter} --prompt {question!r}",
        f"{program} export {adapter} --output {folder}/plain",
        f"{program} train --model {model} --data my.jsonl --top 0.1 --output runs/mine",
    ]


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option("--model", "-m", help="As for `lofit-fast train`.")] = "smollm2",
    train_size: Annotated[int, typer.Option(help="Training stories.")] = 450,
    validation_size: Annotated[int, typer.Option(help="Stories to judge by, of other names and wording.")] = 108,
) -> None:
    """Watch LoFiT find heads in a real model and teach it a task."""
    run_demo(output, model, train_size, validation_size, Console())


if __name__ == "__main__":
    typer.run(main)
