"""Threads on one patched model, each in scopes of its own: every answer compared with its single-thread answer.

    python -m benchmarks.proof.thread_soak [--minutes 10] [--threads 8] [--output FOLDER]

Each job is first done by one thread alone, and its answer kept: logits, gradients, texts or scores, all compared bit
for bit. Then the threads do jobs drawn at random, with Python told to change between them far more often than it would.
After each round the model must be as it was: the modes, the hooks, no scope and no fold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import lofit_fast as lf
from benchmarks.proof.reliability.reliability_page import RESULTS
from benchmarks.proof.reliability.tiny_base import VOCABULARY, character_tokenizer, tiny_base
from benchmarks.proof.reliability.trial_journal import commit, processor
from lofit_fast.data.encode import IGNORED
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.evaluation.shared_prompts import SharedPrompts
from lofit_fast.files import write_json

COMMAND = "python -m benchmarks.proof.thread_soak"
# of which all jobs are made; a round; how long one thread is left alone, where Python would leave it 5e-3
INPUTS, ROUND_SECONDS, SWITCH_SECONDS = 4, 5.0, 1e-5
# the tokens before it are special ones
FIRST_CHARACTER = VOCABULARY.index(" ")
# adapters beside the handle's own, of offsets alone
OTHERS = {"b": [(0, 0), (2, 1)], "c": [(0, 1), (1, 0)], "d": "all"}
HEADS = {"scale": [(0, 0), (1, 1), (2, 3)], "offset": [(0, 1), (1, 0), (1, 3), (2, 2)]}
# failures whose words are kept
MOST_NAMED = 12


@dataclass
class Rig:
    """A patched model in training mode, and what jobs need beside it. positions: on which tokens its vectors act.

    several: whether there are other adapters beside the handle's own, which has no scales then.
    """

    positions: str
    several: bool = False
    model: nn.Module = field(init=False)
    handle: lf.LofitHandle = field(init=False)

    def __post_init__(self) -> None:
        self.model = _model()
        heads = {"offset": HEADS["offset"]} if self.several else HEADS
        self.handle = lf.patch(self.model, lf.LofitConfig(**heads, positions=self.positions))
        generator = torch.Generator().manual_seed(1)
        for number, (name, others) in enumerate(OTHERS.items() if self.several else ()):
            self.handle.add(name, lf.LofitConfig(offset=others, init_std=0.5, seed=number), trained=name == "d")
        with torch.no_grad():
            for vectors in self.handle.parameters():
                vectors.copy_(0.5 * torch.randn(vectors.shape, generator=generator))
        self.model.train()
        self.tokenizer = character_tokenizer()
        self.shared = SharedPrompts()
        self.parameters = list(self.handle.parameters())

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """(ids, labels), (2, S) each: an input of its own length, whose first tokens are the prompt."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(FIRST_CHARACTER, len(VOCABULARY), (2, 9 + 3 * number), generator=generator)
        labels = ids.clone()
        labels[:, : 4 + number] = IGNORED
        return ids, labels

    def texts(self, number: int) -> list[str]:
        """Prompts of different lengths."""
        return [text * (1 + number) for text in ("ab", "What? ", "x=1;")]

    def logits(self, number: int) -> Tensor:
        """Of a forward without gradients."""
        ids, labels = self.batch(number)
        with torch.no_grad():
            return self.model(input_ids=ids, labels=labels, use_cache=False).logits

    def gradients(self, number: int) -> list[Tensor]:
        """Of the vectors, by a training step's forward and backward."""
        ids, labels = self.batch(number)
        return list(torch.autograd.grad(self.model(input_ids=ids, labels=labels).loss, self.parameters))

    def generated(self, number: int, **options) -> list[str]:
        """Greedy answers."""
        return generate_answers(self.model, self.tokenizer, self.texts(number), max_new_tokens=5, **options)


def _base_inside_folded(rig: Rig, number: int) -> list[Tensor]:
    with rig.handle.folded():
        before = rig.logits(number)
        with rig.handle.disabled():
            base = rig.logits(number)
        return [before, base, rig.logits(number)]


def _in(scope: str, job: Callable[[Rig, int], object]) -> Callable[[Rig, int], object]:
    def run(rig: Rig, number: int) -> object:
        with getattr(rig.handle, scope)():
            return job(rig, number)

    return run


def _masked(rig: Rig, number: int) -> Tensor:
    ids, _ = rig.batch(number)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(number)) < 0.5
    with rig.handle.acting_on(mask), torch.no_grad():
        return rig.model(input_ids=ids, use_cache=False).logits


def _scored(rig: Rig, number: int) -> list[Tensor]:
    texts = rig.texts(number)
    return score_choices(rig.model, rig.tokenizer, texts, [["yes", "no", "yes!"]] * len(texts))


# what a thread does -> how; the last ones are for vectors that act on answers alone
JOBS: dict[str, Callable[[Rig, int], object]] = {
    "adapted": Rig.logits,
    "base": _in("disabled", Rig.logits),
    "folded": _in("folded", Rig.logits),
    "base inside folded": _base_inside_folded,
    "gradients": Rig.gradients,
    "generated": Rig.generated,
    "generated by the base": _in("disabled", Rig.generated),
    "scored": _scored,
}
ON_ANSWERS: dict[str, Callable[[Rig, int], object]] = {
    "masked": _masked,
    "prompts shared": lambda rig, number: rig.generated(number, shared=rig.shared),
}


def _with(name: str | None, job: Callable[[Rig, int], object]) -> Callable[[Rig, int], object]:
    """A job that is done with one adapter active, and leaves the handle's own."""

    def run(rig: Rig, number: int) -> object:
        rig.handle.set_active(name)
        try:
            return job(rig, number)
        finally:
            rig.handle.set_active("default")

    return run


def _rows(rig: Rig, number: int) -> Tensor:
    with rig.handle.rows(["b", "d"] if number % 2 else [None, "c"]):
        return rig.logits(number)


def _rows_generated(rig: Rig, number: int) -> Tensor:
    ids, _ = rig.batch(number)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), rig.handle.rows(["c", "b"] if number % 2 else ["default", "d"]):
        return rig.model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def _rows_gradients(rig: Rig, number: int) -> list[Tensor]:
    ids, labels = rig.batch(number)
    with rig.handle.rows(["d", "default"]):
        loss = rig.model(input_ids=ids, labels=labels).loss
    return list(torch.autograd.grad(loss, [*rig.parameters, *rig.handle.parameters("d")]))


# those of a handle with several adapters
AMONG_SEVERAL: dict[str, Callable[[Rig, int], object]] = {
    "adapter b": _with("b", Rig.logits),
    "none active": _with(None, Rig.logits),
    "generated with b": _with("b", Rig.generated),
    "generated with c": _with("c", Rig.generated),
    "generated with d": _with("d", Rig.generated),
    "rows": _rows,
    "rows generated": _rows_generated,
    "rows' gradients": _rows_gradients,
}


@dataclass
class Tally:
    """tried: job -> how often. failed: what went wrong, in words, how often."""

    tried: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, wrong: str | None) -> None:
        """Count a trial."""
        with self._lock:
            self.tried[kind] += 1
            if wrong is not None:
                self.failed[f"{kind}: {wrong}"] += 1


def soak(seconds: float, threads: int = 8, round_seconds: float = ROUND_SECONDS) -> Tally:
    """Rounds of threads for so many seconds at least, by turns on vectors that act everywhere, on answers alone, and of
    several adapters.

    A round of each kind is made in any case.
    """
    tally, until, number = Tally(), time.monotonic() + seconds, 0
    with _switching_often():
        rigs = [(rig, _alone(rig)) for rig in (Rig("all"), Rig("answer"), Rig("all", several=True))]
        while number < len(rigs) or time.monotonic() < until:
            _round(*rigs[number % len(rigs)], tally, threads, round_seconds, seed=number)
            number += 1
    return tally


def _alone(rig: Rig) -> dict[tuple[str, int], object]:
    """(job, number of the input) -> the answer of one thread."""
    return {(kind, number): job(rig, number) for kind, job in _jobs(rig).items() for number in range(INPUTS)}


def _jobs(rig: Rig) -> dict[str, Callable[[Rig, int], object]]:
    if rig.several:
        return {**JOBS, **AMONG_SEVERAL}
    return JOBS if rig.positions == "all" else {**JOBS, **ON_ANSWERS}


def _round(rig: Rig, expected: dict, tally: Tally, threads: int, seconds: float, seed: int) -> None:
    before, jobs, until = _state(rig), _jobs(rig), time.monotonic() + seconds

    def work(worker: int) -> None:
        # of each thread by itself
        torch.set_num_threads(1)
        draw = random.Random(f"{seed} {worker}")
        while time.monotonic() < until:
            kind, number = draw.choice(list(jobs)), draw.randrange(INPUTS)
            tally.note(kind, _tried(partial(jobs[kind], rig, number), expected[kind, number]))

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    after = _state(rig)
    changed = [name for name in before if before[name] != after[name]]
    tally.note("left as it was", f"other {', '.join(changed)}" if changed else None)
    for kind in ("adapted", "generated"):
        tally.note("the next answer", _tried(partial(jobs[kind], rig, 0), expected[kind, 0]))


def _tried(job: Callable[[], object], expected: object) -> str | None:
    try:
        return None if _same(job(), expected) else "another answer than alone"
    # whatever it is, a thread by itself does not raise it
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _same(got: object, expected: object) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(got, Tensor) and torch.equal(got, expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(_same, got, expected))
    return got == expected


def _state(rig: Rig) -> dict[str, object]:
    """What threads must leave as it was."""
    modules = list(rig.model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "modes": [module.training for module in modules],
        "hooks": [list(getattr(module, kind)) for module in modules for kind in hooks],
        "scopes": (rig.handle.scopes.plain, rig.handle.scopes.folding()),
        "gradients": [vectors.grad is None for vectors in rig.parameters],
    }


@contextmanager
def _switching_often() -> Iterator[None]:
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(SWITCH_SECONDS)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        torch.set_num_threads(threads)


def _model() -> nn.Module:
    """The proofs' base, with answers that depend on their prompts."""
    model = tiny_base().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


def row(tally: Tally, threads: int, minutes: float, seconds: float) -> dict[str, object]:
    """What docs/reliability.md says of a soak, as plain data."""
    kinds = {kind: {"tried": count, "failed": _failed(tally, kind)} for kind, count in sorted(tally.tried.items())}
    return {
        "item": 3,
        "what": f"answers of {threads} threads on one patched model, each in scopes of its own, compared bit for bit "
        "with those of one thread",
        "tried": tally.tried.total(),
        "failed": tally.failed.total(),
        "named": [f"{words} ({count} times)" for words, count in tally.failed.most_common(MOST_NAMED)],
        "command": f"{COMMAND} --minutes {minutes:g}",
        "seconds": round(seconds),
        "processor": processor(),
        "commit": commit(),
        "counts": kinds,
    }


def _failed(tally: Tally, kind: str) -> int:
    return sum(count for words, count in tally.failed.items() if words.startswith(f"{kind}: "))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 where an answer was another."""
    parser = argparse.ArgumentParser(prog="benchmarks.proof.thread_soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--threads", type=int, default=8, help="on one model (default: 8)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the JSON (default: {RESULTS})")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    tally = soak(60 * options.minutes, options.threads, min(ROUND_SECONDS, 30 * options.minutes))
    found = row(tally, options.threads, options.minutes, time.monotonic() - started)
    write_json(options.output / "thread_soak.json", found)
    print(f"{found['failed']} of {found['tried']} failed: {json.dumps(found['counts'])}")
    for words in found["named"]:
        print(f"  {words}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
