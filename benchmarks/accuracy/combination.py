"""LoFiT and LoRA together against each alone, on the kinship stories: what the paper leaves to future work.

    python -m benchmarks.accuracy.combination --output runs/combination

Every row sees each story as often: two methods in turn have half of the epochs each. LoFiT's heads are chosen once, by
step 1 on the base model.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import lofit_fast as lf
from benchmarks.accuracy.bootstrap import mean_and_spread
from benchmarks.peers.table import PEERS
from lofit_fast.evaluation.judge import judge
from lofit_fast.files import write_json
from lofit_fast.models.load import load_model
from lofit_fast.tasks.kinship import kinship
from lofit_fast.tasks.task import Task
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.fit import select_by_training
from lofit_fast.training.objectives import Completions
from lofit_fast.training.stage import train_attachment

# the demo's settings, with twice its epochs; LoRA's rate is a usual one of PEFT's, and not tuned here
RECIPE = lf.Recipe(select_epochs=1, tune_epochs=4, batch_size=4, tune_lr=5e-2, top=0.3)
LORA_LR = 1e-3
SELECT_SHARE = 0.36


@dataclass(frozen=True)
class Setup:
    """What all rows share. heads: LoFiT's. epochs: passes over the stories, even, so that two methods share them."""

    tokenizer: object
    task: Task
    heads: list[tuple[int, int]]
    epochs: int
    recipe: lf.Recipe
    seed: int

    def train(self, attachment: Attachment, lr: float, epochs: int) -> None:
        """Train a method that is in its model."""
        schedule = Schedule(lr=lr, epochs=epochs, batch_size=self.recipe.batch_size, seed=self.seed)
        with tempfile.TemporaryDirectory() as folder:
            data = Completions(self.task.train)
            train_attachment(attachment, self.tokenizer, data, schedule, output_dir=folder, progress=False)

    def lofit(self, model: nn.Module, epochs: int) -> lf.LofitHandle:
        """Offsets on the heads, trained."""
        handle = lf.patch(model, lf.LofitConfig(offset=self.heads, seed=self.seed))
        self.train(handle, self.recipe.tune_lr, epochs)
        return handle

    def lora(self, model: nn.Module, epochs: int) -> Attachment:
        """LoRA, trained."""
        lora = PEERS["lora"].make(model, seed=self.seed)
        self.train(lora, LORA_LR, epochs)
        return lora


@contextmanager
def lofit_alone(model: nn.Module, setup: Setup) -> Iterator[nn.Module]:
    """Offsets for all epochs."""
    handle = setup.lofit(model, setup.epochs)
    yield model
    handle.unpatch()


@contextmanager
def lora_alone(model: nn.Module, setup: Setup) -> Iterator[nn.Module]:
    """LoRA for all epochs."""
    lora = setup.lora(model, setup.epochs)
    yield model
    lora.unpatch()


@contextmanager
def lofit_on_lora(model: nn.Module, setup: Setup) -> Iterator[nn.Module]:
    """LoRA for half of the epochs, then offsets on the model with LoRA, which stays as it is."""
    lora = setup.lora(model, setup.epochs // 2)
    # frozen on purpose, so that patching need not warn of it
    for parameter in lora.parameters():
        parameter.requires_grad_(False)
    handle = setup.lofit(model, setup.epochs // 2)
    yield model
    handle.unpatch()
    lora.unpatch()


@contextmanager
def lora_on_lofit(model: nn.Module, setup: Setup) -> Iterator[nn.Module]:
    """Offsets for half of the epochs, merged into a copy, then LoRA on that."""
    merged = setup.lofit(copy.deepcopy(model), setup.epochs // 2).merge()
    setup.lora(merged, setup.epochs // 2)
    yield merged


ROWS: dict[str, Callable] = {row.__name__: row for row in (lofit_alone, lora_alone, lofit_on_lora, lora_on_lofit)}


def compare(model: nn.Module, tokenizer, task: Task, recipe: lf.Recipe, n_seeds: int, folder: Path) -> dict:
    """Exact match of the base model and of each row, by seed, written as combination.json. Returns it."""
    few = Completions(task.train[: max(1, round(SELECT_SHARE * len(task.train)))])
    chosen = select_by_training(model, tokenizer, few, recipe, output_dir=folder / "step1", progress=False)
    setup = Setup(tokenizer, task, chosen.heads, recipe.tune_epochs, recipe, recipe.seed)
    accuracy = {"base": [judge(model, tokenizer, task).metrics["exact_match"]]}
    for name, row in ROWS.items():
        accuracy[name] = []
        for seed in range(recipe.seed, recipe.seed + n_seeds):
            with row(model, replace(setup, seed=seed)) as trained:
                accuracy[name].append(judge(trained, tokenizer, task).metrics["exact_match"])
    result = {"task": task.name, "n_train": len(task.train), "n_heads": len(chosen.heads), "exact_match": accuracy}
    write_json(folder / "combination.json", result)
    return result


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("runs/combination"),
    model: Annotated[str, typer.Option("--model", "-m", help="As for `lofit-fast train`.")] = "smollm2",
    train_size: Annotated[int, typer.Option(help="Training stories.")] = 450,
    validation_size: Annotated[int, typer.Option(help="Stories to judge by.")] = 108,
    seeds: Annotated[int, typer.Option(help="Trainings of every row.")] = 2,
) -> None:
    """Compare LoFiT, LoRA and both on one task, and print a table."""
    base, tokenizer = load_model(model, dtype="float32")
    result = compare(base, tokenizer, kinship(train_size, validation_size, 0), RECIPE, seeds, output)
    print(json.dumps(result, indent=2))
    for name, values in result["exact_match"].items():
        mean, spread = mean_and_spread(values)
        print(f"| {name} | {100 * mean:.1f} % |" + (f" +- {100 * spread:.1f} |" if spread else " |"))


if __name__ == "__main__":
    typer.run(main)
