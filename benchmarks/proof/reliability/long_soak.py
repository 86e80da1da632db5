"""Thousands of steps, patches, swaps and saves in one process: memory stays flat, nothing is left, nothing drifts.

    python -m benchmarks.proof.reliability.long_soak [--count 2000] [--only "patch and unpatch"]

Memory is the process's resident set; its slope is a least-squares line over the iterations after the first fifth, in
bytes per 1,000 iterations.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

import lofit_fast as lf
from benchmarks.proof.reliability.forked import forked
from benchmarks.proof.reliability.kill_anywhere import import_what_it_needs
from benchmarks.proof.reliability.killed_works import WORKS
from benchmarks.proof.reliability.tiny_base import (
    EXAMPLES,
    character_tokenizer,
    filled_vectors,
    tiny_base,
    token_batch,
)
from benchmarks.proof.reliability.trial_journal import FIGURES, Proof, Trial, run
from lofit_fast.files import write_json
from lofit_fast.patching.layer import LofitLinear

PROOF = Proof(
    "soak",
    7,
    "training steps with changing shapes (in a loop, compiled, in fit), patch and unpatch, swaps of vectors, saves and "
    "loads, folds and generation; memory's slope, what is left behind, live against reloaded logits",
    "python -m benchmarks.proof.reliability.long_soak",
)
CONFIGS = (
    lf.LofitConfig(scale="all", offset=[(0, 1), (2, 3)]),
    lf.LofitConfig(offset=[(1, 0), (1, 3)]),
    lf.LofitConfig(scale=[(2, 2)]),
)
# bytes per 1,000 iterations from which memory does not count as flat: allocators move by pages and arenas
FLAT = 2**20
# of the iterations, before memory is looked at, and how often it is
_WARM, _LOOKS = 0.2, 100
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_HOOKS += ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def resident() -> int:
    """Bytes of this process's memory that are there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Of a least-squares line through (iteration, bytes), in bytes per 1,000 iterations."""
    count = len(points)
    middle, mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - middle) ** 2 for x, _ in points)
    return 1000 * sum((x - middle) * (y - mean) for x, y in points) / spread


class Memory:
    """Looks at this process's memory now and then, over so many iterations."""

    def __init__(self, iterations: int) -> None:
        self.first, self.every = int(_WARM * iterations), max(1, iterations // _LOOKS)
        self.points: list[tuple[int, int]] = []

    def look(self, iteration: int) -> None:
        """To be called in every iteration."""
        if iteration >= self.first and iteration % self.every == 0:
            gc.collect()
            self.points.append((iteration, resident()))


def left_on(model: nn.Module) -> dict[str, int]:
    """What may be left of handles: hooks on a model, layers and handles in this process, open files."""
    gc.collect()
    found = gc.get_objects()
    return {
        "hooks": sum(len(getattr(module, kind, ())) for module in model.modules() for kind in _HOOKS),
        "layers": sum(type(one) is LofitLinear for one in found),
        "handles": sum(type(one) is lf.LofitHandle for one in found),
        "files": len(os.listdir("/proc/self/fd")),
    }


def _loss(model: nn.Module, batch: int, length: int, seed: int) -> torch.Tensor:
    ids = token_batch(batch, length, seed)
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loop_steps(iterations: int, memory: Memory, folder: Path, *, compiled: bool = False) -> nn.Module:
    """Steps of AdamW on batches of 1 to 4 sequences of 3 to 40 tokens, an evaluation among every ten."""
    model, draw = tiny_base(), random.Random(0)
    handle = filled_vectors(lf.patch(model, CONFIGS[0]), std=0.01)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3)
    for iteration in range(iterations):
        optimizer.zero_grad()
        _loss(model, draw.randint(1, 4), draw.randint(3, 40), iteration).backward()
        optimizer.step()
        if iteration % 10 == 0:
            with handle.folded():
                _loss(model, 2, draw.randint(3, 40), iteration)
        memory.look(iteration)
    check_reloaded(handle, folder)
    optimizer.zero_grad()
    return handle.unpatch()


def compiled_steps(iterations: int, memory: Memory, folder: Path) -> nn.Module:
    """The same with compiled layers, one graph for all shapes."""
    return loop_steps(iterations, memory, folder, compiled=True)


class _Looks(TrainerCallback):
    """Looks at memory after every step."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def on_step_end(self, args, state, control, **_):
        self.memory.look(state.global_step)


def fit_steps(iterations: int, memory: Memory, folder: Path) -> nn.Module:
    """Steps of `fit`, with a checkpoint after every second one: as many epochs as that takes."""
    model = tiny_base()
    recipe = lf.Recipe(tune_epochs=max(1, iterations // 2), batch_size=4)
    how = {"output_dir": folder / "run", "heads": [(0, 1), (2, 3)], "callbacks": [_Looks(memory)], "progress": False}
    result = lf.fit(model, character_tokenizer(), EXAMPLES, recipe, **how)
    check_reloaded(result.handle, folder)
    return result.handle.unpatch()


def patches(iterations: int, memory: Memory, folder: Path) -> nn.Module:
    """Patch, a forward and backward pass, unpatch."""
    model = tiny_base()
    expected = _logits(model)
    for iteration in range(iterations):
        handle = filled_vectors(lf.patch(model, CONFIGS[iteration % len(CONFIGS)]))
        _loss(model, 1, 3 + iteration % 5, iteration).backward()
        handle.unpatch()
        memory.look(iteration)
    del handle
    if not torch.equal(_logits(model), expected):
        raise ArithmeticError("the model has drifted from what it was")
    return model


def swaps(iterations: int, memory: Memory, folder: Path) -> nn.Module:
    """Two adapters in turn in one handle, each computing what it computed before."""
    model = tiny_base()
    handle = lf.patch(model, CONFIGS[0])
    adapters, expected = [], []
    for seed in (1, 2):
        filled_vectors(handle, seed).save(folder / str(seed))
        adapters.append(folder / str(seed))
        expected.append(_logits(model))
    handle.unpatch()
    for iteration in range(iterations):
        handle = lf.load(model, adapters[iteration % 2])
        if not torch.equal(_logits(model), expected[iteration % 2]):
            raise ArithmeticError(f"swap {iteration} computes something else")
        handle.unpatch()
        memory.look(iteration)
    del handle
    return model


def saves(iterations: int, memory: Memory, folder: Path) -> nn.Module:
    """An adapter that is changed, saved over the last one, and loaded into another model."""
    model, other = tiny_base(), tiny_base()
    handle = lf.patch(model, CONFIGS[0])
    for iteration in range(iterations):
        filled_vectors(handle, iteration)
        handle.save(folder / "adapter")
        if iteration % 20 == 0:
            check_reloaded(handle, folder, other)
        else:
            lf.load(other, folder / "adapter").unpatch()
        memory.look(iteration)
    return handle.unpatch()


def folds(iterations: int, memory: Memory, folder: Path) -> nn.Module:
    """Generation in folded and disabled scopes."""
    model = tiny_base()
    handle = filled_vectors(lf.patch(model, CONFIGS[0]))
    expected = model.generate(token_batch(1, 4), max_new_tokens=2, do_sample=False)
    for iteration in range(iterations):
        with handle.folded() if iteration % 2 else nullcontext():
            got = model.generate(token_batch(1, 4), max_new_tokens=2, do_sample=False)
        if not torch.equal(got, expected):
            raise ArithmeticError(f"generation {iteration} gives something else")
        with handle.disabled(), torch.no_grad():
            model(token_batch(1, 3 + iteration % 9))
        memory.look(iteration)
    return handle.unpatch()


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(token_batch()).logits


def check_reloaded(handle: lf.LofitHandle, folder: Path, model: nn.Module | None = None) -> None:
    """Raise ArithmeticError unless a plain model with the saved adapter computes, to the last bit, what this one does.

    A compiled live model is compared with itself as it is uncompiled.
    """
    handle.save(folder / "adapter")
    reloaded = lf.load(tiny_base() if model is None else model, folder / "adapter")
    with torch.compiler.set_stance("force_eager"):
        drift = (_logits(handle.model) - _logits(reloaded.model)).abs().max().item()
    reloaded.unpatch()
    if drift:
        raise ArithmeticError(f"the reloaded model's logits differ by {drift:.1e}")


KINDS: dict[str, Callable[[int, Memory, Path], nn.Module]] = {
    "steps": loop_steps,
    "compiled steps": compiled_steps,
    "steps of fit": fit_steps,
    "patch and unpatch": patches,
    "swaps": swaps,
    "saves and loads": saves,
    "folds and generation": folds,
}


def soaked(kind: str, iterations: int, folder: Path) -> dict[str, object]:
    """{"slope": bytes per 1,000 iterations, "left": what is there and was not before}. Raises what the kind does."""
    shutil.rmtree(folder, ignore_errors=True)
    # what the first use of a library leaves open is none of ours
    for name in ("first", "rest"):
        (folder / name).mkdir(parents=True)
    KINDS[kind](4, Memory(4), folder / "first")
    before = left_on(tiny_base())
    memory = Memory(iterations)
    after = left_on(KINDS[kind](iterations, memory, folder / "rest"))
    return {"slope": slope(memory.points), "left": {name: after[name] - before[name] for name in before}}


def trials(options, root: Path) -> Iterator[Trial]:
    """Every kind, `count` iterations of it in a process of its own."""
    torch.set_num_threads(1)
    root = root.absolute()
    import_what_it_needs(WORKS["fit"], root / "imports")
    for kind in KINDS:
        yield Trial(kind, kind, lambda k=kind: _outcome(k, options.count, root), tried=options.count)


def _outcome(kind: str, iterations: int, root: Path) -> str | None:
    ended = forked(lambda: soaked(kind, iterations, root / "soak"), LOFIT_FAST_CACHE=str(root / "cache"), deadline=7200)
    if not ended.done:
        return f"ends with {ended.raised[:1]}: {ended.message[:160]}"
    found = ended.value
    _note(root / FIGURES, f"{kind}: bytes per 1,000 iterations", round(found["slope"]))
    left = {name: count for name, count in found["left"].items() if count > 0}
    if left:
        return f"leaves {left}"
    return None if found["slope"] <= FLAT else f"memory grows by {found['slope']:.0f} bytes per 1,000 iterations"


def _note(path: Path, name: str, figure: int) -> None:
    figures = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, figures | {name: figure})


if __name__ == "__main__":
    run(PROOF, trials, 2000)
