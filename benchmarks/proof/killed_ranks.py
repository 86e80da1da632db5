"""Kills one process of a data-parallel run in the midst of its training, ten times, and goes on with the run each time.

    python -m benchmarks.proof.killed_ranks [--count 10] [--processes 2] [--rank 1]

The processes meet as torchrun's do, over TCP on this machine, and train a tiny model. One of them is killed by SIGKILL
at a random moment of its processor time between its first step and its last. What is asked: the others end by
themselves, within the time limit, with an error that names it; the folder is whole; and started again, all of them
leave what a run that nothing has stopped leaves, bit for bit. docs/results/distributed/killed_ranks.json has the
trials.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback

import lofit_fast as lf
from benchmarks.proof.reliability.forked import Child, Ended
from benchmarks.proof.reliability.same_folders import difference, partly_there
from benchmarks.proof.reliability.tiny_base import RECIPE, character_tokenizer, tiny_base
from benchmarks.speed.timing import machine
from lofit_fast.files import write_json

RESULT = Path("docs") / "results" / "distributed" / "killed_ranks.json"
LIMIT_MINUTES = 1.0
EXAMPLES = [
    {"prompt": f"{a}+{b}=", "completion": b + a}
    for a, b in zip("abcdefghijklmnopqrstuvwx", "mnopqrstuvwxyz0123456789", strict=True)
]
# where a process notes its steps, beside the run
_STEPS = "steps.jsonl"


class NotesSteps(TrainerCallback):
    """Writes down which step a process is in, and its processor time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_begin(self, args, state, control, **_):
        """A line for each step."""
        row = {"stage": Path(args.output_dir).name, "step": state.global_step + 1, "cpu": time.process_time()}
        with self.path.open("a") as file:
            file.write(json.dumps({**row, "epoch": int(state.epoch or 0) + 1}) + "\n")


def trained(folder: Path) -> list:
    """A fit in each process of a run. Returns the heads."""
    from lofit_fast import ranks

    torch.set_num_threads(1)
    ranks.begun()
    notes = NotesSteps(folder / f"{ranks.rank()}.{_STEPS}")
    how = {"output_dir": folder / "run", "progress": False, "callbacks": [notes]}
    # 4 for one and for two, and what others can share
    recipe = replace(RECIPE, batch_size=2 * max(2, ranks.count()))
    return lf.fit(tiny_base(), character_tokenizer(), EXAMPLES, recipe, **how).heads


def together(n: int, folder: Path, first_ended: int, kill_at: float | None = None) -> tuple[dict[int, Ended], float]:
    """How each of n processes has ended, and the seconds from the end of one of them to that of the last.

    first_ended: the one that is waited for first, and killed after kill_at seconds of its processor time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    shared["LOFIT_FAST_TIMEOUT_MINUTES"] = str(LIMIT_MINUTES)
    children = {
        rank: Child(lambda: trained(folder), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(n)
    }
    ends = {first_ended: children.pop(first_ended).ended(kill_at)}
    since = time.monotonic()
    ends |= {rank: child.ended(deadline=60 * LIMIT_MINUTES + 30) for rank, child in children.items()}
    return ends, time.monotonic() - since


def trial(n: int, killed: int, whole: Path, root: Path, draw: random.Random) -> dict[str, object]:
    """A run that loses a process, and what came of it: `wrong` is None or a sentence."""
    steps = _steps(whole, killed)
    for _ in range(5):
        folder = root / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        ends, seconds = together(n, folder, killed, draw.uniform(steps[0]["cpu"], steps[-1]["cpu"]))
        if ends[killed].killed:
            break
    at = _steps(folder, killed)[-1]
    others = [end for rank, end in ends.items() if rank != killed]
    found = {**{key: at[key] for key in ("stage", "epoch", "step")}, "others_ended_after_s": round(seconds, 2)}
    return {**found, "said": others[0].message, "wrong": _wrong(n, killed, folder, whole, ends)}


def _wrong(n: int, killed: int, folder: Path, whole: Path, ends: dict[int, Ended]) -> str | None:
    for rank, end in ends.items():
        if rank != killed and (end.hung or "ElsewhereError" not in end.raised):
            return f"process {rank} {'hangs' if end.hung else f'ends with {end.raised[:1]}: {end.message}'}"
        if rank != killed and not re.search(rf"process {killed}\b(?! of)", end.message):
            return f"process {rank} does not name it: {end.message}"
    if part := partly_there(folder / "run"):
        return f"in part: {part}"
    again, _ = together(n, folder, killed)
    if failed := [f"process {rank}: {end.message}" for rank, end in again.items() if not end.done]:
        return f"does not go on: {'; '.join(failed)}"
    return difference(whole / "run", folder / "run")


def _steps(folder: Path, rank: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{rank}.{_STEPS}").read_text().splitlines()]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def trials(n: int, killed: int, count: int, root: Path, say: Callable[[str], None] = print) -> list[dict]:
    """So many runs that lose a process, beside one that does not."""
    whole = root / "whole"
    # what a first run imports and compiles is there for all that are forked later
    trained(root / "imports")
    gc.collect()
    gc.freeze()
    ends, _ = together(n, whole, killed)
    if failed := [end.message for end in ends.values() if not end.done]:
        raise RuntimeError(f"the run that nobody stops has failed: {failed}")
    rows = []
    for number in range(count):
        rows.append(trial(n, killed, whole, root, random.Random(number)))
        say(f"{number + 1}/{count}: {rows[-1]}")
    return rows


def main() -> None:
    """All trials, and their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("count", 10), ("processes", 2), ("rank", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        rows = trials(asked.processes, asked.rank, asked.count, Path(root))
    failed = sum(row["wrong"] is not None for row in rows)
    found = {"machine": machine(), "processes": asked.processes, "killed": asked.rank, "limit_minutes": LIMIT_MINUTES}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    path = (
        RESULT
        if asked.rank == 1 and asked.processes == 2
        else RESULT.with_name(f"killed_rank_{asked.rank}_of_{asked.processes}.json")
    )
    write_json(path, {**found, "trials": rows, "failed": failed})
    print(
        f"{len(rows) - failed} of {len(rows)} as asked; the slowest of the others ended after "
        f"{max(row['others_ended_after_s'] for row in rows)} s: {path}"
    )
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
