"""How each kind of method is fitted and judged: one table, FITTING."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from benchmarks.accuracy.cell_settings import OF_STEP2, SHOTS, of_lora_first, part_of, peer_options, recipe_of
from benchmarks.accuracy.paper_cells import Cell
from benchmarks.accuracy.task_parts import TaskData
from lofit_fast.config import Head, Recipe
from lofit_fast.evaluation.judge import score_candidates
from lofit_fast.files import write_json
from lofit_fast.heads import scores_as_json, scores_from_json, select_heads
from lofit_fast.tasks.contrast import contrasts
from lofit_fast.tasks.task import Task, exact_match
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.attachment import Attachment

# of a recipe, what the heads that another selector chooses do not depend on: their number is its own affair
_NOT_OF_HEADS = tuple(name for name in OF_STEP2 if name != "top")


@dataclass(frozen=True)
class Bench:
    """What a cell is run with. task: its own part of the data. folder: for a run's files, taken away afterwards.
    selections: heads once chosen, shared between cells. engine: the same for every method."""

    model: nn.Module
    tokenizer: object
    data: TaskData
    task: Task
    folder: Path
    selections: Path
    engine: Engine


@dataclass
class Fitted:
    """A method in the model, to be judged. seconds: of "selection" and "training". settings: all hyperparameters.

    task: what it is judged on. attachments: in the order in which they came into the model. judged: hits, where the
    method answers without the model's generation.
    """

    task: Task
    attachments: tuple[Attachment, ...] = ()
    heads: list[Head] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    n_parameters: int = 0
    judged: list[float] | None = None

    def judge(self, bench: Bench, task: Task) -> tuple[dict[str, float], list[float]]:
        """(metrics, a hit per question) of the model as it now is."""
        if self.judged is not None:
            return {"exact_match": sum(self.judged) / len(self.judged)}, self.judged
        from lofit_fast.evaluation.judge import judge

        judgement = judge(bench.model, bench.tokenizer, task)
        return judgement.metrics, [float(hit) for hit in judgement.hits]


@contextmanager
def fitted(bench: Bench, cell: Cell, kind: str) -> Iterator[Fitted]:
    """A scope in which the cell's method is in the model; afterwards the model is as it was, whatever happened."""
    result = FITTING[kind](bench, cell)
    try:
        yield result
    finally:
        for attachment in reversed(result.attachments):
            attachment.unpatch()


def _base(bench: Bench, cell: Cell) -> Fitted:
    return Fitted(bench.task)


def _few_shot(bench: Bench, cell: Cell) -> Fitted:
    from benchmarks.peers.prompting import few_shot

    return Fitted(few_shot(bench.task, SHOTS, seed=cell.seed), settings={"shots": SHOTS})


def _majority(bench: Bench, cell: Cell) -> Fitted:
    answer = Counter(example.completion.strip() for example in bench.task.train).most_common(1)[0][0]
    hits = [float(exact_match(answer, example.answers)) for example in bench.task.validation]
    return Fitted(bench.task, judged=hits, settings={"answer": answer})


def _constrained(bench: Bench, cell: Cell) -> Fitted:
    task = bench.task
    scores = score_candidates(bench.model, bench.tokenizer, [e.prompt for e in task.validation], task.candidates)
    said = [task.candidates[int(i)] for i in scores.argmax(1)]
    hits = [float(exact_match(text, e.answers)) for text, e in zip(said, task.validation, strict=True)]
    return Fitted(task, judged=hits, settings={"candidates": len(task.candidates)})


def _fitted(bench: Bench, cell: Cell) -> Fitted:
    from benchmarks.peers.table import COMPARED

    make, options = COMPARED[cell.method].make, peer_options(cell)
    started = time.perf_counter()
    attachment = make(bench.model, bench.tokenizer, contrasts(bench.task, cell.seed), seed=cell.seed, **options)
    seconds = {"training": time.perf_counter() - started}
    return Fitted(bench.task, (attachment,), seconds=seconds, settings=options, n_parameters=attachment.n_parameters())


def _trained(bench: Bench, cell: Cell, **more) -> Fitted:
    """more: options of the peer that the cell itself decides."""
    from benchmarks.peers.table import COMPARED

    options = {**peer_options(cell), **more}
    making = {key: value for key, value in options.items() if key != "lr"}
    attachment = COMPARED[cell.method].make(bench.model, seed=cell.seed, **making)
    try:
        seconds = _train(bench, attachment, lr=options["lr"], epochs=cell.epochs, seed=cell.seed)
    except BaseException:
        attachment.unpatch()
        raise
    return Fitted(
        bench.task,
        (attachment,),
        seconds={"training": seconds},
        settings={**options, "epochs": cell.epochs},
        n_parameters=attachment.n_parameters(),
    )


def _train(bench: Bench, attachment: Attachment, *, lr: float, epochs: int, seed: int) -> float:
    """Seconds of training an attachment on the task: with DPO where it has preferences."""
    from lofit_fast.training.arguments import Schedule
    from lofit_fast.training.stage import train_attachment

    schedule = Schedule(lr, epochs, seed=seed)
    how = {"output_dir": bench.folder, "engine": bench.engine, "progress": False}
    return train_attachment(attachment, bench.tokenizer, _objective(bench), schedule, **how)["seconds"]


def _objective(bench: Bench):
    """What the task is trained on; nothing is judged meanwhile."""
    from lofit_fast.training.objectives import objective_of

    return objective_of(replace(bench.task, validation=[]))


def _lofit(bench: Bench, cell: Cell) -> Fitted:
    return _offsets(bench, recipe_of(cell), *_heads(bench, cell))


def _offsets(bench: Bench, recipe: Recipe, heads: list[Head], selecting: float) -> Fitted:
    """LoFiT's step 2. selecting: the seconds of choosing the heads."""
    from lofit_fast.training.fit import fit_objective

    how = {"output_dir": bench.folder, "heads": heads, "engine": bench.engine, "progress": False}
    result = fit_objective(bench.model, bench.tokenizer, _objective(bench), recipe, **how)
    return Fitted(
        bench.task,
        (result.handle,),
        heads=heads,
        seconds={"selection": selecting, "training": result.metrics["tune"]["seconds"]},
        settings=asdict(recipe),
        n_parameters=result.handle.n_parameters(),
    )


def _lofit_scaled(bench: Bench, cell: Cell) -> Fitted:
    """LoFiT with a scale beside every offset."""
    return _offsets(bench, replace(recipe_of(cell), tune_scales=True), *_heads(bench, cell))


def _lora_on_heads(bench: Bench, cell: Cell) -> Fitted:
    """LoRA in the layers in which LoFiT's step 1 has chosen heads, and in no other."""
    lofit = part_of(cell, "lofit")
    heads, selecting = _heads(bench, lofit)
    lora = _trained(bench, part_of(cell, "lora"), layers=sorted({layer for layer, _ in heads}))
    settings = {"lofit": asdict(recipe_of(lofit)), "lora": lora.settings}
    return replace(lora, heads=heads, seconds={**lora.seconds, "selection": selecting}, settings=settings)


def _lofit_on_lora(bench: Bench, cell: Cell) -> Fitted:
    """LoRA for half of the epochs, then offsets on the model with LoRA, which stays as it is, for the other half.

    The heads are those that step 1 chooses on the base model. Of an odd number of epochs the offsets have one more.
    """
    of_lora, lofit = of_lora_first(cell), part_of(cell, "lofit")
    if not of_lora:
        raise ValueError(f"expected at least 2 epochs, for two methods in turn, got {cell.epochs}")
    heads = _heads(bench, lofit)
    lora = _trained(bench, replace(part_of(cell, "lora"), epochs=of_lora))
    try:
        # frozen on purpose, so that patching need not warn of it
        for parameter in lora.attachments[0].parameters():
            parameter.requires_grad_(False)
        offsets = _offsets(bench, replace(recipe_of(lofit), tune_epochs=cell.epochs - of_lora), *heads)
    except BaseException:
        lora.attachments[0].unpatch()
        raise
    return replace(
        offsets,
        attachments=lora.attachments + offsets.attachments,
        seconds={**offsets.seconds, "training": lora.seconds["training"] + offsets.seconds["training"]},
        settings={"lofit": offsets.settings, "lora": lora.settings},
        n_parameters=lora.n_parameters + offsets.n_parameters,
    )


def _heads(bench: Bench, cell: Cell) -> tuple[list[Head], float]:
    """(heads, the seconds of choosing them), chosen now or by an earlier cell.

    The scores of step 1 serve every number of heads; what other selectors choose may depend on it.
    """
    recipe, task = recipe_of(cell), bench.task
    if cell.heads_from:
        part = {"train_size": cell.heads_size, "n_judged": 1, "seed": cell.seed, "split": cell.split}
        task = bench.data.part(cell.heads_from, **part)
    learnt = cell.heads_size if cell.heads_from else cell.train_size
    of_heads = {key: value for key, value in asdict(recipe).items() if key not in _NOT_OF_HEADS}
    kept = recipe.of_step1() if cell.selector == "lofit" else of_heads
    # what is set aside for tuning changes what is drawn from the rest
    aside = cell.n_validation if cell.split != "validation" else 0
    identity = [cell.model, cell.heads_from or cell.task, cell.selector, cell.split, aside, learnt, kept]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    dtype = str(bench.model.dtype).removeprefix("torch.")
    path = bench.selections / dtype / f"{digest}.json"
    if not path.is_file():
        from lofit_fast.selection.methods import SELECTORS, TRAINED

        run: dict[str, object] = {"output_dir": bench.folder / "selection", "seed": cell.seed, "progress": False}
        run |= {"engine": bench.engine} if cell.selector in TRAINED else {}
        chosen = SELECTORS[cell.selector](bench.model, bench.tokenizer, task, recipe, **run)
        scores = None if chosen.scores is None else scores_as_json(chosen.scores)
        content = {"heads": [list(pair) for pair in chosen.heads], "scores": scores, "seconds": chosen.seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    content = json.loads(path.read_text())
    if cell.selector == "lofit":
        return select_heads(scores_from_json(content["scores"]), recipe.top, recipe.min_layer), content["seconds"]
    return [tuple(pair) for pair in content["heads"]], content["seconds"]


# a method's kind -> what brings it into the model
FITTING: dict[str, Callable[[Bench, Cell], Fitted]] = {
    "base": _base,
    "majority": _majority,
    "constrained": _constrained,
    "few_shot": _few_shot,
    "fitted": _fitted,
    "trained": _trained,
    "lofit": _lofit,
    "lofit_scaled": _lofit_scaled,
    "lofit_on_lora": _lofit_on_lora,
    "lora_on_heads": _lora_on_heads,
}
