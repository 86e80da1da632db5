"""What a cell is run with: LoFiT's recipe, a peer's options, and whether a finished cell was run with the same."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace

from benchmarks.accuracy.method_table import LOFIT_DEFAULTS, METHODS
from benchmarks.accuracy.paper_cells import Cell, as_options
from lofit_fast.config import RECIPES, Recipe

SHOTS = 5
# what of a recipe is of step 2 alone
OF_STEP2 = ("top", "tune_lr", "tune_epochs", "tune_scales")
# the options that are LoFiT's, where a cell has those of two methods
_OF_LOFIT = {setting.name for setting in fields(Recipe)}


def recipe_of(cell: Cell) -> Recipe:
    """LoFiT's recipe of a cell. One whose heads are chosen on another task has the published step 1 of that task."""
    return Recipe(**_lofit(cell))


def part_of(cell: Cell, method: str) -> Cell:
    """The cell as one of the two methods it is made of would have it, "lofit" or "lora", with the settings of that."""
    own = {key: value for key, value in cell.options if (key in _OF_LOFIT) == (method == "lofit")}
    return replace(cell, method=method, options=as_options(own))


def peer_options(cell: Cell) -> dict[str, object]:
    """All hyperparameters of a peer but its epochs: those nobody has set too, so that a finished cell says them."""
    from benchmarks.peers.table import COMPARED

    peer = COMPARED[cell.method]
    there = inspect.signature(peer.make).parameters.values()
    defaults = {one.name: one.default for one in there if one.default is not one.empty and one.name != "seed"}
    rate = {"lr": peer.lr} if peer.kind == "trained" else {}
    return {**defaults, **rate, **peer.options, **dict(cell.options)}


def settings_today(cell: Cell) -> dict[str, object]:
    """What the file of a cell that is run now says under "settings", but for what comes of the data."""
    return _SETTINGS.get(METHODS[cell.method].kind, lambda cell: {})(cell)


def agree(now: Mapping[str, object], then: Mapping[str, object]) -> bool:
    """Whether two sets of settings are the same, as far as both say them: older files say fewer."""
    now = json.loads(json.dumps(now))
    return all(
        agree(now[key], then[key]) if isinstance(now[key], dict) else now[key] == then[key]
        for key in now.keys() & then.keys()
    )


def of_lora_first(cell: Cell) -> int:
    """How many of the epochs LoRA has where offsets follow: half, and of an odd number one fewer."""
    return cell.epochs // 2


def _lofit(cell: Cell) -> dict[str, object]:
    published = dict(RECIPES.get(cell.task, {}))
    if cell.heads_from:
        theirs = RECIPES.get(cell.heads_from, {})
        published = {key: value for key, value in published.items() if key in OF_STEP2}
        published |= {key: value for key, value in theirs.items() if key not in OF_STEP2}
    own = {"seed": cell.seed, "select_epochs": cell.epochs, "tune_epochs": cell.epochs}
    return {**published, **LOFIT_DEFAULTS, **dict(cell.options), **own}


def _recipe(cell: Cell, **changes: object) -> dict[str, object]:
    return {**asdict(Recipe()), **_lofit(cell), **changes}


def _trained(cell: Cell) -> dict[str, object]:
    return {**peer_options(cell), "epochs": cell.epochs}


def _lofit_on_lora(cell: Cell) -> dict[str, object]:
    first = of_lora_first(cell)
    offsets = _recipe(part_of(cell, "lofit"), tune_epochs=cell.epochs - first)
    return {"lofit": offsets, "lora": _trained(replace(part_of(cell, "lora"), epochs=first))}


def _lora_on_heads(cell: Cell) -> dict[str, object]:
    lora = _trained(part_of(cell, "lora"))
    # the layers are those of the heads
    del lora["layers"]
    return {"lofit": _recipe(part_of(cell, "lofit")), "lora": lora}


# a method's kind -> its settings; other kinds have none
_SETTINGS = {
    "few_shot": lambda cell: {"shots": SHOTS},
    "fitted": peer_options,
    "trained": _trained,
    "lofit": _recipe,
    "lofit_scaled": lambda cell: _recipe(cell, tune_scales=True),
    "lofit_on_lora": _lofit_on_lora,
    "lora_on_heads": _lora_on_heads,
}
