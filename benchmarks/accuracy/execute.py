"""Runs cells on real models: one load per model, which must come back from every cell as it was."""

from __future__ import annotations

import gc
import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.accuracy.fitting import Bench, fitted
from benchmarks.accuracy.method_table import METHODS
from benchmarks.accuracy.paper_cells import VALIDATION, Cell
from benchmarks.accuracy.task_parts import TaskData
from lofit_fast.files import writable_folder, write_text
from lofit_fast.models.load import load_model
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.auto import has_compiler
from lofit_fast.training.summary import environment


class Executor:
    """cell -> what its file holds: metrics, hits, outside, n_parameters, seconds, heads, settings, environment, commit.

    data: the tasks' folder. work: a folder for what cells share and for runs' files; nothing in it is a result.
    dtype, device: of `load_model`. engine: of every training; None compiles the layers, where there is a compiler.
    """

    def __init__(
        self,
        data: Path | str | None,
        work: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        engine: Engine | None = None,
    ) -> None:
        # layers are compiled once for hundreds of cells, which no rule for one run knows of
        self.engine = engine or Engine(compile=has_compiler())
        self.folder, self.work, self.where = data, writable_folder(work), {"dtype": dtype, "device": device}
        write_text(self.work / ".gitignore", "*\n")
        self.name: str | None = None
        self.model: nn.Module | None = None
        self.data = self.tokenizer = self.digest = None
        self.commit = commit()

    def __call__(self, cell: Cell) -> dict:
        """Run a cell. Raises whatever its method raises, and RuntimeError when the model comes back changed."""
        self._load(cell.model)
        folder = self.work / "runs" / cell.name
        try:
            result = self._run(cell, folder)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            # what went wrong may have left something behind
            if model_digest(self.model) != self.digest:
                self._forget()
            raise
        shutil.rmtree(folder, ignore_errors=True)
        if model_digest(self.model) != self.digest:
            self._forget()
            raise RuntimeError(f"{cell.method} did not leave the model as it was")
        return result

    def _run(self, cell: Cell, folder: Path) -> dict:
        sizes = {"train_size": cell.train_size, "n_judged": cell.n_validation, "seed": cell.seed, "split": cell.split}
        task = self.data.part(cell.task, **sizes)
        bench = Bench(self.model, self.tokenizer, self.data, task, folder, self.work / "selections", self.engine)
        began = time.perf_counter()
        with fitted(bench, cell, METHODS[cell.method].kind) as method:
            ready = time.perf_counter()
            metrics, hits = method.judge(bench, method.task)
            judging = time.perf_counter() - ready
            outside = {name: self._outside(name, cell, method, bench) for name in cell.outside}
            ended = time.perf_counter()
        return {
            "metrics": metrics,
            "hits": hits,
            "outside": outside,
            "n_parameters": method.n_parameters,
            "seconds": {"selection": 0.0, "training": 0.0, **method.seconds, "judging": judging, "cell": ended - began},
            "heads": None if method.heads is None else [list(pair) for pair in method.heads],
            "settings": method.settings,
            "environment": {**environment(self.model), "engine": "compiled" if self.engine.compile else "not compiled"},
            **self.commit,
        }

    def _outside(self, name: str, cell: Cell, method, bench: Bench) -> dict:
        there = self.data.whole(name)
        count = min(cell.n_outside, len(there.choices or there.validation))
        task = self.data.part(name, train_size=0, n_judged=count, seed=cell.seed, split=VALIDATION)
        metrics, hits = method.judge(bench, task)
        return {"metrics": metrics, "hits": hits}

    def _load(self, name: str) -> None:
        if self.name == name:
            return
        self._forget()
        self.model, self.tokenizer = load_model(name, **self.where)
        self.name, self.data = name, TaskData(self.folder, self.tokenizer)
        self.digest = model_digest(self.model)

    def _forget(self) -> None:
        self.name = self.model = self.tokenizer = self.data = self.digest = None
        gc.collect()


def model_digest(model: nn.Module) -> str:
    """SHA-256 over every module's class and hooks, and every parameter's and buffer's bytes and whether it trains."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)
        digest.update(f"{name} {type(module).__name__} {hooks} {module.training}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.requires_grad} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def commit() -> dict[str, object]:
    """The checkout's commit, and whether tracked files but results differed from it; None and None outside one."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)docs/results")
    return {"commit": head, "dirty": None if head is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
