"""The unit of the benchmark: a cell is one measurement in a process of its own, and one JSON file."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.speed.timing import machine
from lofit_fast.files import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# of a round of steps: two batches. The fewer there are, the less stock batches are padded compared with an epoch's,
# which flatters stock training
PER_ROUND = 16


@dataclass(frozen=True)
class Options:
    """What a whole run of the benchmark is asked for. rounds: None leaves it to each cell."""

    data: str | None = None
    rounds: int | None = None
    examples: int = PER_ROUND

    def stamp(self) -> dict:
        """What of it a result depends on; a path is no part of that."""
        return {**asdict(self), "data": "CLUTRR" if self.data else "kinship"}


@dataclass(frozen=True)
class Cell:
    """name: "<model>/<what>". measure: (options) -> plain data; raises Absent. minutes: about how long it takes."""

    name: str
    measure: Callable[[Options], dict]
    minutes: float


@dataclass(frozen=True)
class Store:
    """The cells' files of one machine: <results>/<device>/cells/.

    A file counts as finished only for the same code, machine and options, so that a run which was interrupted goes on
    and a run of other code starts anew.
    """

    folder: Path
    stamp: dict

    @classmethod
    def here(cls, results: Path, options: Options) -> Store:
        """The store of this machine and this checkout's code."""
        where = machine()
        stamp = {"code": code_digest(), "machine": device_slug(where), "versions": where["versions"]}
        return cls(results / device_slug(where), {**stamp, **options.stamp()})

    def path(self, cell: str) -> Path:
        """A cell's file: "SmolLM2-135M/memory hook step 1" -> "SmolLM2-135M.memory-hook-step-1.json"."""
        return self.folder / "cells" / f"{cell.replace('/', '.').replace(' ', '-')}.json"

    def read(self, cell: str) -> dict | None:
        """A cell's content if it was measured (or found absent) by this code, here, with these options."""
        path = self.path(cell)
        content = json.loads(path.read_text()) if path.is_file() else None
        return content if content and content["stamp"] == self.stamp else None

    def finished(self, cell: str) -> bool:
        """Whether there is nothing left to measure; what was absent is looked for again."""
        content = self.read(cell)
        return content is not None and "absent" not in content

    def write(self, cell: str, content: dict, seconds: float) -> None:
        """Keep a cell."""
        made = {"cell": cell, "meta": machine(), "stamp": self.stamp, "cell_seconds": seconds}
        write_json(self.path(cell), {**made, **content})


def device_slug(where: dict) -> str:
    """A folder name for a machine: its GPU, or its processor and threads."""
    gpu = where["device"] != "cpu"
    text = where["device"] if gpu else f"{where['processor']} {where['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def code_digest() -> str:
    """SHA-256 over the Python that measurements depend on: all but the report's. Sees what is not committed yet."""
    digest = hashlib.sha256()
    for folder in ("kernels", "lofit_fast", "benchmarks"):
        for path in sorted(p for p in (ROOT / folder).rglob("*.py") if not p.stem.startswith("bench_")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_python(*arguments: str) -> None:
    """A fresh interpreter of this environment in this checkout. Raises RuntimeError with the end of what it said."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])} failed: {(done.stdout + done.stderr).strip()[-1500:]}")
