"""The same seed gives the same adapter, bit for bit: run twice, and killed and resumed, for every engine setting.

    python -m benchmarks.proof.reliability.same_seed [--only attention]

Three runs a setting, each in a process of its own: two undisturbed, one killed at a random moment and called again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import lofit_fast as lf
from benchmarks.proof.reliability.kill_anywhere import begin_in, call_in, import_what_it_needs
from benchmarks.proof.reliability.killed_works import WORKS, Work
from benchmarks.proof.reliability.same_folders import difference
from benchmarks.proof.reliability.tiny_base import EXAMPLES, HELD_OUT, LAST_HEADS, character_tokenizer, tiny_base
from benchmarks.proof.reliability.trial_journal import Proof, Trial, run
from lofit_fast.config import SELECT

PROOF = Proof(
    "determinism",
    6,
    "the same seed run twice, and killed and resumed, for every setting of the engine and every way to choose heads",
    "python -m benchmarks.proof.reliability.same_seed",
)


@dataclass(frozen=True)
class Setting:
    """engine, recipe: of the run. heads: to tune, instead of step 1. threads: that torch computes with."""

    engine: dict[str, object]
    recipe: dict[str, object]
    heads: list | None = None
    threads: int = 1


def _engine(**knobs) -> Setting:
    return Setting(knobs, {})


def _last(positions: str = "all", **knobs) -> Setting:
    return Setting(knobs, {"positions": positions}, LAST_HEADS)


# a knob of the engine is the first word
SETTINGS: dict[str, Setting] = {
    "attention eager": _engine(attention="eager"),
    "attention sdpa": _engine(attention="sdpa"),
    "attention lofit_grouped": _engine(attention="lofit_grouped"),
    "attention lofit_causal": _engine(attention="lofit_causal"),
    "compile no": _engine(compile=False),
    "compile yes": _engine(compile=True),
    "group_by_length no": _engine(group_by_length=False),
    "packing no": _engine(packing=False),
    "packing yes": _engine(packing=True, attention="lofit_grouped"),
    "prefix_cache_gb": _last(prefix_cache_gb=0.1),
    "prompt_cache_gb": _last("answer", prompt_cache_gb=0.1),
    "prompt_cache_gb none": _last("answer", prompt_cache_gb=0),
    "narrow no": _engine(narrow=False),
    "narrow yes": _engine(narrow=True),
    "large_pages no": _engine(large_pages=False),
    "large_pages yes": _engine(large_pages=True),
    "prepack no": _engine(prepack=False),
    "prepack yes": _engine(prepack=True),
    "frozen_products full": _engine(frozen_products="full"),
    "frozen_products int8": _engine(frozen_products="int8"),
    "verify yes": _engine(verify=True),
    "2 threads": Setting({}, {}, threads=2),
    **{f"select {way}": Setting({}, {"select": way}) for way in SELECT},
}


def fit_with(setting: Setting, folder: Path) -> None:
    """The run of a setting in `run`."""
    torch.set_num_threads(setting.threads)
    recipe = lf.Recipe(**{"top": 2, "select_epochs": 2, "tune_epochs": 2, "batch_size": 4, **setting.recipe})
    how = {"output_dir": folder / "run", "heads": setting.heads, "eval_data": HELD_OUT, "progress": False}
    engine = lf.Engine(**setting.engine)
    lf.fit(tiny_base(), character_tokenizer(), EXAMPLES, recipe, engine=engine, **how).handle.unpatch()


def thrice(name: str, number: int, root: Path) -> str | None:
    """What differs between two undisturbed runs, or between them and one that was killed and resumed."""
    work = Work(partial(fit_with, SETTINGS[name]))
    folders = [begin_in(root / f"run {at}", work) for at in range(3)]
    ends = [call_in(folder, work) for folder in folders[:2]]
    draw = random.Random(f"{name}/{number}")
    ends.append(call_in(folders[2], work, kill_at=draw.uniform(0.2, 0.9) * ends[1].cpu))
    ends.append(call_in(folders[2], work))
    for ended in ends:
        if not ended.done and not ended.killed:
            return f"a run ends with {ended.raised[:1]}: {ended.message[:160]}"
    if wrong := difference(*folders[:2]):
        return f"run twice: {wrong}"
    wrong = difference(folders[0], folders[2])
    return wrong and f"killed and resumed: {wrong}"


def trials(options, root: Path) -> Iterator[Trial]:
    """Every setting, `count` times."""
    torch.set_num_threads(1)
    root = root.absolute()
    import_what_it_needs(WORKS["fit"], root / "imports")
    for number in range(options.count):
        for name in SETTINGS:
            call = partial(thrice, name, number, root)
            yield Trial(f"{name} {number}", name.partition(" ")[0], call, tried=2)


if __name__ == "__main__":
    run(PROOF, trials, 3)
