"""Damages adapters, runs, heads files, caches, sweeps and data in every way, and reads them again.

    python -m benchmarks.proof.reliability.corrupt_anything [--count 10000] [--minutes 60] [--only adapter]

Each reading must refuse with a sentence (a ValueError, TypeError or OSError), or give what the undamaged one gives; in
either case it leaves the model as it was, writes nothing outside the folder that it is given, runs no planted pickle,
and ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import torch

import lofit_fast as lf
from benchmarks.proof.reliability.damaged_files import DAMAGED, Damaged, base_model, same
from benchmarks.proof.reliability.file_faults import OutsideWatch
from benchmarks.proof.reliability.file_mutations import RAN, TRIAL, kinds_for
from benchmarks.proof.reliability.trial_journal import Proof, Trial, run

PROOF = Proof(
    "corrupt",
    2,
    "damaged adapters, run folders, heads files, caches, autotune answers, sweep files, data and models: bits, cuts, "
    "shapes, dtypes, headers, non-finite numbers, paths, links, deep JSON, encodings, pickles",
    "python -m benchmarks.proof.reliability.corrupt_anything",
)
_REFUSED = (ValueError, TypeError, OSError)
# of processor time; and of it, in as many seconds, what one that works takes at least
_SECONDS, _IDLE = 30, 0.05


class Hangs(BaseException):
    """A reading takes longer than any that works."""


class Subject:
    """One kind of folder: made whole once, read once for what it should give, damaged ever anew."""

    def __init__(self, name: str, damaged: Damaged, root: Path, watch: OutsideWatch) -> None:
        self.name, self.damaged, self.watch = name, damaged, watch
        self.whole, self.trial = root / name.replace(" ", "-") / "whole", root / name.replace(" ", "-") / TRIAL
        shutil.rmtree(self.whole.parent, ignore_errors=True)
        self.whole.mkdir(parents=True)
        # some files name the folder that they are in
        self.trial.mkdir()
        os.environ["LOFIT_FAST_CACHE"] = str(self.trial / "cache")
        damaged.make(self.trial)
        shutil.copytree(self.trial, self.whole, dirs_exist_ok=True)
        files = {path for pattern in damaged.names for path in self.whole.rglob(pattern) if _holds_something(path)}
        self.files = [str(path.relative_to(self.whole)) for path in sorted(files) if not _is_lock(path)]
        self.expected = self._read()
        self.state = {name: tensor.clone() for name, tensor in base_model().state_dict().items()}

    def damage(self, number: int, seed: int) -> tuple[str, str, Random]:
        """(file, kind of damage, what draws the rest) of a trial."""
        draw = Random(f"{seed}/{self.name}/{number}")
        file = draw.choice(self.files)
        return file, draw.choice(sorted(kinds_for(Path(file)))), draw

    def tried(self, number: int, seed: int) -> str | None:
        """What is wrong with the reading of the damaged folder; None for nothing."""
        file, kind, draw = self.damage(number, seed)
        self._put_back()
        kinds_for(Path(file))[kind](self.trial / file, draw)
        with self.watch.inside(self.trial), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failed = self._judged(Path(file).name)
        if self.watch.seen:
            failed = f"writes outside of its folder: {self.watch.seen[0].replace(str(self.trial.parent), '')}"
        if RAN.exists():
            RAN.rmdir()
            failed = "runs a planted pickle"
        failed = self._model_left(failed)
        return failed and f"{_place(file)}, {kind}: {failed}"

    def _put_back(self) -> None:
        for folder in (self.trial, self.trial.with_name("outside")):
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, self.trial)

    def _read(self) -> object:
        os.environ["LOFIT_FAST_CACHE"] = str(self.trial / "cache")
        with _in_time():
            return self.damaged.read(self.trial)

    def _judged(self, name: str) -> str | None:
        try:
            got = self._read()
        except _REFUSED as error:
            return _unclear(error, name, self.trial)
        except Hangs:
            return "does not end"
        # whatever else it is, it is no refusal
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return None if self.damaged.free or same(got, self.expected) else "gives another result in silence"

    def _model_left(self, failed: str | None) -> str | None:
        model = base_model()
        if (handle := lf.handle_of(model)) is not None:
            handle.unpatch()
            failed = "leaves the model patched"
        now = model.state_dict()
        if now.keys() != self.state.keys() or not all(torch.equal(now[n], t) for n, t in self.state.items()):
            model.load_state_dict(self.state)
            failed = "leaves the model changed"
        return failed


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_lock(path: Path) -> bool:
    return path.name.endswith((".lock", ".owner.json")) or path.name.startswith(".")


def _place(file: str) -> str:
    """A file's place, without the number of a checkpoint or the key of a store."""
    return "/".join("*" if len(part) == 32 else part for part in Path(file).parts)


def _unclear(error: Exception, name: str, folder: Path) -> str | None:
    """What is unclear in a refusal: one that another library raised names neither a file nor what was expected."""
    text = str(error)
    ours = type(error) in (ValueError, TypeError, OSError, FileNotFoundError, BlockingIOError)
    named = name in text or str(folder) in text or getattr(error, "filename", None)
    return None if ours or named else f"a raw {type(error).__name__} that names no file: {' '.join(text.split())[:80]}"


@contextmanager
def _in_time() -> Iterator[None]:
    """A scope that ends with Hangs when it takes too long."""

    begun = before = time.process_time()

    def late(*_) -> None:
        nonlocal before
        now = time.process_time()
        # on a busy machine one that works is slow; one that waits for ever does nothing
        if now - before < _IDLE or now - begun > _SECONDS:
            raise Hangs
        before = now

    handler = signal.signal(signal.SIGALRM, late)
    # a test may be timed too
    left, _ = signal.setitimer(signal.ITIMER_REAL, _SECONDS, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


def trials(options, root: Path, damaged: dict[str, Damaged] = DAMAGED) -> Iterator[Trial]:
    """Of `count` trials every kind of folder has its share."""
    torch.set_num_threads(1)
    # what is imported late is compiled, beside its source
    sys.dont_write_bytecode = True
    watch = OutsideWatch()
    parts = options.count / sum(one.share for one in damaged.values())
    wanted = {name: one for name, one in damaged.items() if name.startswith(options.only)}
    subjects = {name: Subject(name, one, root.absolute(), watch) for name, one in wanted.items()}
    counts = {name: max(1, round(one.share * parts)) for name, one in wanted.items()}
    # evenly over the time, so that one that stops early has tried some of each
    drawn = sorted((number / counts[name], name, number) for name in wanted for number in range(counts[name]))
    for _, name, number in drawn:
        call = partial(subjects[name].tried, number, options.seed)
        yield Trial(f"{name} {options.seed} {number}", name, call)


if __name__ == "__main__":
    run(PROOF, trials, 10_000)
