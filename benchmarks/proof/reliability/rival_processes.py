"""Two processes at one folder, one cache, one model, at the same time, on a machine that is busy.

    python -m benchmarks.proof.reliability.rival_processes [--count 250] [--only "one run folder"]

Two trainings in one run folder: one trains, the other is refused with the first's process and host, or comes later and
finds the run done, or another one; what is left is the run that nothing has disturbed, bit for bit. Two fills of one
cache, two conversions of one model, two autotunes: both end well, with the results of one alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from socket import gethostname

import torch

import lofit_fast as lf
from benchmarks.proof.reliability.forked import Child, Ended, forked
from benchmarks.proof.reliability.kill_anywhere import begin_in, import_what_it_needs
from benchmarks.proof.reliability.killed_works import WORKS, Work, convert_gguf
from benchmarks.proof.reliability.same_folders import difference, scratch
from benchmarks.proof.reliability.tiny_base import (
    EXAMPLES,
    LAST_HEADS,
    character_tokenizer,
    save_base,
    tiny_base,
)
from benchmarks.proof.reliability.trial_journal import Proof, Trial, run

PROOF = Proof(
    "processes",
    4,
    "two processes at a time in one run folder, filling one prefix or prompt cache, converting one model, autotuning "
    "one device, beside two that keep the processor busy",
    "python -m benchmarks.proof.reliability.rival_processes",
)
_SPINNERS = 2


def fit_with_seed(seed: int, folder: Path) -> None:
    """A run of both steps in `run`, of which the seed makes another one."""
    recipe = lf.Recipe(top=2, select_epochs=1, tune_epochs=2, batch_size=4, seed=seed)
    how = {"output_dir": folder / "run", "progress": False}
    lf.fit(tiny_base(), character_tokenizer(), EXAMPLES, recipe, **how).handle.unpatch()


def fit_in(name: str, engine: lf.Engine, positions: str, folder: Path) -> None:
    """Step 2 in a run folder of its own, with the cache that both share."""
    recipe = lf.Recipe(tune_epochs=1, batch_size=4, positions=positions)
    how = {"output_dir": folder / name, "heads": LAST_HEADS, "engine": engine, "progress": False}
    lf.fit(tiny_base(), character_tokenizer(), EXAMPLES, recipe, **how).handle.unpatch()


def measure(tokens: int, folder: Path) -> None:
    """Autotune for so many tokens."""
    from lofit_fast.models import op_paths

    layers = op_paths.layers_of(str(save_base(folder)))
    op_paths.measure_paths(layers, ["all"], [tokens], torch.float32, torch.device("cpu"), rounds=1)


@contextmanager
def busy() -> Iterator[None]:
    """A scope in which other processes take the processor."""

    def spin() -> None:
        while True:
            pass

    spinners = [Child(spin) for _ in range(_SPINNERS)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.ended()


def both(folder: Path, *calls: Callable[[Path], object]) -> list[tuple[int, Ended]]:
    """(process id, end) of calls that begin at the same time."""
    environment = {"LOFIT_FAST_CACHE": str(folder / "cache")}
    with busy():
        children = [Child(partial(call, folder), environment) for call in calls]
        return [(child.pid, child.ended()) for child in children]


def one_run_folder(seeds: tuple[int, int], expected: dict[int, Path], folder: Path) -> str | None:
    """Two trainings in one folder. expected: the folders of runs alone, by seed."""
    ends = both(folder, *(partial(fit_with_seed, seed) for seed in seeds))
    others = {pid: other for (pid, _), (other, _) in zip(ends, reversed(ends), strict=True)}
    for pid, ended in ends:
        if wrong := _refusal(ended, others[pid], seeds[0] != seeds[1]):
            return wrong
    if not any(ended.done for _, ended in ends):
        return "neither has trained"
    state = json.loads((folder / "run" / "state.json").read_text())
    seed = state["identity"]["recipe"]["seed"]
    return difference(expected[seed], folder) or _left(folder)


def _refusal(ended: Ended, other: int, another_run: bool) -> str | None:
    """What is wrong with how one of two has ended; None where it has trained, or been refused as it should."""
    if ended.done:
        return None
    first = f"process {other} on host {gethostname()}"
    if "BlockingIOError" in ended.raised and first in ended.message:
        return None
    # it came when the other had ended
    if another_run and ended.raised[:1] == ("ValueError",) and "holds a run with another recipe" in ended.message:
        return None
    return f"the second ends with {ended.raised[:1]}: {ended.message[:160]}, expected it to name {first}"


def shared_cache(calls, expected: Path, folder: Path) -> str | None:
    """Both must end well, with what one after the other leaves."""
    for _, ended in both(folder, *calls):
        if not ended.done:
            return f"one of two ends with {ended.raised[:1]}: {ended.message[:160]}"
    return difference(expected, folder) or _left(folder)


def two_autotunes(folder: Path) -> str | None:
    """The file must hold the answers of both."""
    save_base(folder)
    tokens = (16, 64)
    for _, ended in both(folder, *(partial(measure, count) for count in tokens)):
        if not ended.done:
            return f"one of two ends with {ended.raised[:1]}: {ended.message[:160]}"
    (file,) = (folder / "cache" / "autotune").glob("*.json")
    kept = {row["case"]["tokens"] for row in json.loads(file.read_text())["answers"]}
    return None if kept == set(tokens) else f"the answers for {sorted(set(tokens) - kept)} tokens are lost"


def _left(folder: Path) -> str | None:
    left = next(scratch(folder), None)
    return None if left is None else f"scratch is left in {left.parent.relative_to(folder)}"


def alone_in(folder: Path, *calls: Callable[[Path], object]) -> Path:
    """The folder after the calls, one after the other, undisturbed."""
    begin_in(folder, Work(lambda _: None))
    for call in calls:
        ended = forked(partial(call, folder), LOFIT_FAST_CACHE=str(folder / "cache"))
        if not ended.done:
            raise RuntimeError(f"it does not even run alone: {ended}")
    return folder


def kinds(root: Path) -> dict[str, Callable[[Path], str | None]]:
    """Kind of rivalry -> a trial of it in an empty folder."""
    seeds = {seed: alone_in(root / f"seed {seed}", partial(fit_with_seed, seed)) for seed in (1, 2)}
    fills = {
        "prefix cache": (lf.Engine(prefix_cache_gb=0.1), "all"),
        "prompt cache": (lf.Engine(prompt_cache_gb=0.1), "answer"),
    }
    found: dict[str, Callable[[Path], str | None]] = {
        "one run folder, one seed": partial(one_run_folder, (1, 1), seeds),
        "one run folder, two seeds": partial(one_run_folder, (1, 2), seeds),
    }
    for name, how in fills.items():
        calls = [partial(fit_in, at, *how) for at in ("one", "two")]
        found[name] = partial(shared_cache, calls, alone_in(root / name, *calls))
    conversions = [convert_gguf, convert_gguf]
    found["conversion"] = partial(shared_cache, conversions, alone_in(root / "conversion", *conversions))
    return found | {"autotune": two_autotunes}


def trials(options, root: Path) -> Iterator[Trial]:
    """`count` rivalries, of all kinds in turn."""
    torch.set_num_threads(1)
    root = root.absolute()
    for name in ("fit", "conversion", "autotune"):
        import_what_it_needs(WORKS[name], root / "imports")
    found = kinds(root)
    share = max(1, round(options.count / len(found)))
    of_kinds = [_trials_of(kind, call, share, root / "trial") for kind, call in found.items()]
    return (trial for turn in zip_longest(*of_kinds) for trial in turn)


def _trials_of(kind: str, call: Callable[[Path], str | None], count: int, folder: Path) -> Iterator[Trial]:
    def run_in_an_empty_folder() -> str | None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return call(folder)

    for number in range(count):
        yield Trial(f"{kind} {number}", kind, run_in_an_empty_folder)


if __name__ == "__main__":
    run(PROOF, trials, 300)
