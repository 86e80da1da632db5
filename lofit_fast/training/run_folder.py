"""A run folder: what stage a training is in, and what it has produced so far."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lofit_fast.config import Head
from lofit_fast.files import as_json, given_path, read_json, same_json, writable_folder, write_text
from lofit_fast.heads import heads_of, scores_as_json, scores_from_json
from lofit_fast.locks import alone
from lofit_fast.sealed import SEAL, read_sealed, seal_of, write_sealed
from lofit_fast.training.run_clearing import STATE, check_places, clear, clear_scratch, left_in

_NEXT = {"select": "tune", "tune": "done"}
# what an earlier run has left is being taken away; the new one has not begun
_CLEARING = "clearing"
_STAGES = (_CLEARING, "select", "tune", "done")
_OF_A_RUN = {"stage": str, "identity": dict, "metrics": dict}
_LOCK = ".lock"
_START_OVER = "start over with resume=False (--no-resume), which replaces what it has left, or choose another folder"


@contextmanager
def held(folder: Path | str, *, wait: bool = False) -> Iterator[None]:
    """A scope in which a run folder belongs to one process, and in it to one thread.

    wait: whether to wait for the one who has it. Raises BlockingIOError (an OSError) naming the process and the host
    that train there, OSError for a folder that cannot be written.
    """
    folder = writable_folder(folder)
    with alone(folder / _LOCK, f"train in {folder}", wait=wait):
        yield


@dataclass(frozen=True)
class RunFolder:
    """state.json (identity and stage), select/, heads.json, tune/, adapter/, history.jsonl.

    Every file is replaced whole, so that a killed run resumes from the last one written. Reading needs no lock; `open`
    is for the one that trains. state.json, heads.json and each line of history.jsonl carry a checksum of their content.
    """

    path: Path

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path | str,
        identity: Mapping[str, object],
        resume: bool,
        *,
        wait: bool = False,
        mend: bool = False,
        as_now: Callable[[dict], dict] = dict,
    ) -> Iterator[RunFolder]:
        """A scope in which a folder is this run's: begun, or gone on with. One process, and thread, is in it at a time.

        Args:
            path: the folder, made where there is none.
            identity: what makes two runs the same one (recipe, model, data, heads).
            resume: whether to go on with the run in the folder; else what it has left is taken away.
            wait: whether to wait for a process that trains there.
            mend: whether a run with a damaged state is begun anew, which is said, rather than refused.
            as_now: turns the identity that an earlier release has kept into what this one would have.

        After a training that diverged another learning rate of that step is no other run.

        Raises:
            BlockingIOError: another process, which is named with its host, trains in the folder.
            OSError: it cannot be written.
            ValueError: it holds a run of another identity, or a damaged one, and resume is on; or such files without
                being a run.
        """
        run = cls(given_path(path))
        # nothing is put into a folder of something else, not even a lock
        run._look()
        with held(run.path, wait=wait):
            clear_scratch(run.path)
            run._begin(as_json(identity), resume, mend, as_now)
            yield run

    def _begin(self, identity: dict, resume: bool, mend: bool, as_now: Callable[[dict], dict]) -> None:
        state, damage = self._look()
        if resume and damage is not None:
            if not mend:
                raise ValueError(f"{damage}: {_START_OVER}")
            print(f"warning: {damage}; the run begins anew", file=sys.stderr)
        if resume and state is not None and state["stage"] != _CLEARING:
            check_places(self.path)
            # earlier releases wrote infinity itself
            self._go_on(state, identity, as_json(as_now(state["identity"])))
            return
        # were this interrupted, the folder would say so, and be cleared again
        if left_in(self.path):
            write_sealed(self.path / STATE, {"stage": _CLEARING, "identity": identity, "metrics": {}})
            clear(self.path)
        write_sealed(self.path / STATE, {"stage": "select", "identity": identity, "metrics": {}})

    def _look(self) -> tuple[dict | None, str | None]:
        """(state, what is wrong with it): of no file (None, None). Raises ValueError for what is none of a run's."""
        path = self.path / STATE
        if path.is_dir():
            raise _not_ours(path)
        if not path.exists() and not path.is_symlink():
            if left := left_in(self.path):
                raise ValueError(
                    f"{self.path} holds {', '.join(left)} but no {STATE}, so they are no run of ours to replace: "
                    "choose another folder"
                )
            return None, None
        if not path.exists():
            return None, f"{path} is a link that leads to nothing"
        try:
            state = read_sealed(path)
        except ValueError as error:
            if _is_other_json(path):
                raise _not_ours(path) from error
            return None, str(error)
        # others write files of this name too, `datasets` for one
        if len(_OF_A_RUN.keys() & state.keys()) < 2:
            raise _not_ours(path)
        wrong = [name for name, kind in _OF_A_RUN.items() if not isinstance(state.get(name), kind)]
        wrong += ["stage"] * (state.get("stage") not in _STAGES)
        return (None, f"{path} is damaged: it has no {wrong[0]} of a run") if wrong else (state, None)

    def _go_on(self, state: dict, identity: dict, before: dict) -> None:
        differing = sorted(k for k in identity.keys() | before.keys() if not same_json(identity.get(k), before.get(k)))
        changed = _rate_changed(state, before, identity) if differing == ["recipe"] else None
        if differing and changed is None:
            paths = [path for name in differing for path in _inside(name, before.get(name), identity.get(name))]
            told = f"; what differs is {', '.join(paths)}" if paths != differing else ""
            raise ValueError(
                f"{self.path} holds a run with another {', '.join(differing)}: choose another folder, or start over "
                f"with resume=False (--no-resume){told}"
            )
        if changed is not None:
            changes = [*state.get("changed", []), changed]
            kept = {name: value for name, value in state.items() if name != "diverged"}
            write_sealed(self.path / STATE, {**kept, "identity": identity, "changed": changes})
        elif not same_json(state["identity"], identity):
            write_sealed(self.path / STATE, {**state, "identity": identity})
        # read now, and not after hours
        _ = self.history
        try:
            _ = self.heads, self.scores, self.chosen_by
        except ValueError as error:
            if state["stage"] == "done":
                raise
            print(f"{error}; the heads are chosen again, from what step 1 has left", file=sys.stderr)
            (self.path / "heads.json").unlink()

    def _state(self) -> dict:
        return read_sealed(self.path / STATE)

    def _update(self, **changes: object) -> None:
        write_sealed(self.path / STATE, {**self._state(), **changes})

    @property
    def stage(self) -> str:
        """ "select", "tune" or "done"; "clearing" while what an earlier run has left is taken away."""
        return self._state()["stage"]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Per finished stage, what was measured at its end."""
        return self._state()["metrics"]

    def engine(self, stage: str) -> dict[str, object] | None:
        """The settled engine that a stage was begun with, as plain data; None before it has begun."""
        return self._state().get("engine", {}).get(stage)

    def made_with(self, stage: str) -> dict[str, object]:
        """What else decides a stage's last bits, as it was begun: threads, versions, device. Empty where not kept."""
        return self._state().get("made_with", {}).get(stage, {})

    def keep_engine(self, stage: str, engine: dict[str, object], made_with: dict[str, object] | None = None) -> None:
        """A stage begins: keep the engine it is run with, so that a resumed run goes on as it began."""
        state = self._state()
        engines = {**state.get("engine", {}), stage: engine}
        more = {} if made_with is None else {"made_with": {**state.get("made_with", {}), stage: made_with}}
        self._update(engine=engines, **more)

    def keep_source(self, source: Mapping[str, object] | None) -> None:
        """Keep where the data came from, see `run_source`, as it is by now; None leaves what is there."""
        if source is not None and not same_json(source, self._state().get("source")):
            self._update(source=dict(source))

    def record(self, stage: str, metrics: dict[str, float]) -> None:
        """A stage is over: keep what was measured and move on to the next."""
        self._update(stage=_NEXT[stage], metrics={**self.metrics, stage: metrics})

    def note_divergence(self, stage: str, lr: float, **where: object) -> None:
        """A stage has diverged: from here on it may be gone on with at another learning rate."""
        self._update(diverged={"stage": stage, "lr": lr, **where})

    def adopt(self, other: RunFolder, heads: Sequence[Head]) -> None:
        """Take step 1 from another run that has finished it: its epochs, metrics and scores, and `heads` of those.

        The engine that it ran with comes along: with another one that changes results, the run is another.
        """
        for row in other.history:
            if row["stage"] == "select":
                self.append_history(row)
        own, theirs = self._state(), other._state()
        begun = {
            name: {**own.get(name, {}), "select": theirs[name]["select"]}
            for name in ("engine", "made_with")
            if "select" in theirs.get(name, {})
        }
        metrics = {**own["metrics"], "select": theirs["metrics"]["select"]}
        self._update(stage=_NEXT["select"], metrics=metrics, **begun)
        self.write_heads(heads, other.scores, other.chosen_by)

    @property
    def heads(self) -> list[Head] | None:
        """The chosen heads, best first; None before step 1 has ended. Raises ValueError for a damaged file."""
        content = self._heads_file()
        return None if content is None else heads_of(content, self.path / "heads.json")

    @property
    def scores(self) -> Tensor | None:
        """The (layers, heads) scores the heads were chosen by; None when they were given."""
        scores = (self._heads_file() or {}).get("scores")
        return None if scores is None else scores_from_json(scores)

    @property
    def chosen_by(self) -> str | None:
        """The way the heads were chosen, a key of `SELECT`; None when they were given."""
        content = self._heads_file()
        return None if content is None else content.get("select")

    def write_heads(self, heads: Sequence[Head], scores: Tensor | None, select: str | None = None) -> None:
        """Keep the chosen heads, the (layers, heads) scores they were chosen by, and the way; None for given heads."""
        table = None if scores is None else scores_as_json(scores)
        content = {"heads": [list(pair) for pair in heads], "scores": table}
        write_sealed(self.path / "heads.json", content | ({} if select is None else {"select": select}))

    def _heads_file(self) -> dict | None:
        path = self.path / "heads.json"
        if not path.is_file():
            return None
        content = read_sealed(path)
        scores = content.get("scores")
        if scores is not None and not _is_table(scores):
            raise ValueError(f"{path} holds no scores of a run: expected numbers, or null, by layer and head")
        return content

    @property
    def history(self) -> list[dict]:
        """One dict per epoch so far. Raises ValueError naming the line that is damaged."""
        path = self.path / "history.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [_row(path, number, line) for number, line in enumerate(lines, start=1)]

    def append_history(self, row: dict) -> None:
        """Add an epoch, in place of one of the same stage and number from before an interruption."""
        kept = [r for r in self.history if (r["stage"], r["epoch"]) != (row["stage"], row["epoch"])]
        self._write_history([*kept, row])

    def forget_after(self, stage: str, epoch: float) -> None:
        """Drop the epochs of a stage after the one that it goes on from: they are trained again."""
        rows, last = self.history, math.ceil(epoch - 1e-6)
        kept = [row for row in rows if row["stage"] != stage or row["epoch"] <= last]
        if kept != rows:
            self._write_history(kept)

    def _write_history(self, rows: Iterable[dict]) -> None:
        write_text(self.path / "history.jsonl", "".join(json.dumps(r | {SEAL: seal_of(r)}) + "\n" for r in rows))


def dtype_of_run(folder: Path | str) -> str | None:
    """The dtype that the run in a folder was begun in, "bfloat16" say; None where there is no run, or no word of it."""
    try:
        dtype = read_sealed(Path(folder) / STATE)["identity"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dtype if isinstance(dtype, str) else None


def _not_ours(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not that of a run, so it is none of ours to go on with or replace: choose another folder"
    )


def _is_other_json(path: Path) -> bool:
    """Whether it is whole JSON that is no object: no damaged state of a run, but something else's file."""
    try:
        return not isinstance(read_json(path), dict)
    except ValueError:
        return False


def _rate_changed(state: dict, before: dict, identity: dict) -> dict | None:
    """What changes where a run that diverged goes on with another learning rate; None where anything else differs."""
    diverged = state.get("diverged")
    stage = diverged.get("stage") if isinstance(diverged, dict) else None
    # one that has been finished since did not diverge after all
    if stage not in ("select", "tune") or stage in state["metrics"]:
        return None
    name = f"{stage}_lr"
    was, now = before.get("recipe"), identity["recipe"]
    if not isinstance(was, dict) or not same_json({**was, name: None}, {**now, name: None}):
        return None
    return {"setting": name, "was": was.get(name), "now": now[name], "after": diverged}


def _inside(name: str, kept: object, now: object) -> list[str]:
    """The entries in which two values differ, by their paths: "model.settings.rope_parameters"."""
    if not isinstance(kept, dict) or not isinstance(now, dict):
        return [name]
    differing = sorted(key for key in kept.keys() | now.keys() if not same_json(kept.get(key), now.get(key)))
    return [path for key in differing for path in _inside(f"{name}.{key}", kept.get(key), now.get(key))]


def _row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
        whole = isinstance(row, dict) and row["stage"] in _NEXT and isinstance(row["epoch"], int)
        problem = "it is no row of an epoch"
        # rows of earlier releases carry no checksum
        if whole and SEAL in row and row.pop(SEAL) != seal_of(row):
            whole, problem = False, "it is not what was written: its content has another SHA-256 than it says"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        whole, problem = False, f"it is not whole JSON ({error})"
    if not whole:
        raise ValueError(f"line {number} of {path} is damaged: {problem}; {_START_OVER}")
    return row


def _is_table(scores: object) -> bool:
    """Whether it is rows of one length of numbers, with None where there is no such head."""
    rows = scores if isinstance(scores, list) else [None]
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        return False
    return all(x is None or type(x) in (int, float) for row in rows for x in row)
