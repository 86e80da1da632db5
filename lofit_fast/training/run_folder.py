"""A run folder: what stage a training is in, and what it has produced so far."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lofit_fast.config import Head
from lofit_fast.data.encode import Encoded
from lofit_fast.files import writable_folder, write_json, write_text
from lofit_fast.heads import heads_of, with_digest
from lofit_fast.patching.placement import is_dense, plain_attributes

_NEXT = {"select": "tune", "tune": "done"}
_FOLDERS = ("select", "tune", "adapter", "profile")
_FILES = ("heads.json", "history.jsonl", "summary.json", "heads.png", "loss.png")


@dataclass(frozen=True)
class RunFolder:
    """state.json (identity and stage), select/, heads.json, tune/, adapter/, history.jsonl.

    Every file is replaced whole, so that a killed run resumes from the last one written.
    """

    path: Path

    @classmethod
    def open(cls, path: Path | str, identity: dict, resume: bool) -> "RunFolder":
        """Create the folder, or go on with the run in it.

        identity: what makes two runs the same one (recipe, model, data, heads).
        Raises OSError when it cannot be written, ValueError when it holds a run of another identity and resume is on,
        or such files without being a run.
        """
        run = cls(writable_folder(path))
        state = run._read("state.json")
        if state is not None and not _of_a_run(state):
            raise ValueError(
                f"{run.path / 'state.json'} is not that of a run, so it is none of ours to go on with or replace: "
                "choose another folder"
            )
        # as JSON would return it: tuples become lists
        identity = json.loads(json.dumps(identity))
        if resume and state is not None:
            before = state["identity"]
            differing = sorted(k for k in identity.keys() | before.keys() if identity.get(k) != before.get(k))
            if differing:
                raise ValueError(
                    f"{run.path} holds a run with another {', '.join(differing)}: choose another folder, or start "
                    "over with resume=False (--no-resume)"
                )
            return run
        left = [name for name in (*_FOLDERS, *_FILES) if (run.path / name).exists()]
        if left and state is None:
            raise ValueError(
                f"{run.path} holds {', '.join(left)} but no state.json, so they are no run of ours to replace: choose "
                "another folder"
            )
        for name in _FOLDERS:
            shutil.rmtree(run.path / name, ignore_errors=True)
        for name in _FILES:
            (run.path / name).unlink(missing_ok=True)
        write_json(run.path / "state.json", {"stage": "select", "identity": identity, "metrics": {}})
        return run

    @property
    def stage(self) -> str:
        """ "select", "tune" or "done"."""
        return self._read("state.json")["stage"]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Per finished stage, what was measured at its end."""
        return self._read("state.json")["metrics"]

    def engine(self, stage: str) -> dict[str, object] | None:
        """The settled engine that a stage was begun with, as plain data; None before it has begun."""
        return self._read("state.json").get("engine", {}).get(stage)

    def keep_engine(self, stage: str, engine: dict[str, object]) -> None:
        """A stage begins: keep the engine it is run with, so that a resumed run goes on as it began."""
        state = self._read("state.json")
        write_json(self.path / "state.json", {**state, "engine": {**state.get("engine", {}), stage: engine}})

    def record(self, stage: str, metrics: dict[str, float]) -> None:
        """A stage is over: keep what was measured and move on to the next."""
        state = self._read("state.json")
        metrics = {**state["metrics"], stage: metrics}
        write_json(self.path / "state.json", {**state, "stage": _NEXT[stage], "metrics": metrics})

    def adopt(self, other: "RunFolder", heads: Sequence[Head]) -> None:
        """Take step 1 from another run that has finished it: its epochs, metrics and scores, and `heads` of those."""
        for row in other.history:
            if row["stage"] == "select":
                self.append_history(row)
        self.record("select", other.metrics["select"])
        self.write_heads(heads, other.scores, other.chosen_by)

    @property
    def heads(self) -> list[Head] | None:
        """The chosen heads, best first; None before step 1 has ended."""
        content = self._read("heads.json")
        return None if content is None else heads_of(content, self.path / "heads.json")

    @property
    def scores(self) -> Tensor | None:
        """The (layers, heads) scores the heads were chosen by; None when they were given."""
        content = self._read("heads.json")
        return None if content is None or content["scores"] is None else torch.tensor(content["scores"])

    @property
    def chosen_by(self) -> str | None:
        """The way the heads were chosen, a key of `SELECT`; None when they were given."""
        content = self._read("heads.json")
        return None if content is None else content.get("select")

    def write_heads(self, heads: Sequence[Head], scores: Tensor | None, select: str | None = None) -> None:
        """Keep the chosen heads, the (layers, heads) scores they were chosen by, and the way; None for given heads."""
        content = {"heads": [list(pair) for pair in heads], "scores": None if scores is None else scores.tolist()}
        write_json(self.path / "heads.json", with_digest(content | ({} if select is None else {"select": select})))

    @property
    def history(self) -> list[dict]:
        """One dict per epoch so far."""
        path = self.path / "history.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [_parsed(path, line) for line in lines]

    def append_history(self, row: dict) -> None:
        """Add an epoch, in place of one of the same stage and number from before an interruption."""
        kept = [r for r in self.history if (r["stage"], r["epoch"]) != (row["stage"], row["epoch"])]
        write_text(self.path / "history.jsonl", "".join(json.dumps(r) + "\n" for r in [*kept, row]))

    def _read(self, name: str) -> dict | None:
        path = self.path / name
        return _parsed(path, path.read_text()) if path.is_file() else None


def data_digest(examples: Sequence[Encoded]) -> str:
    """SHA-256 over the token ids and labels of a data set."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example["input_ids"], example["labels"]]).encode())
    return digest.hexdigest()


def weights_digest(projections: Iterable[nn.Module]) -> str:
    """SHA-256 over the first row of every projection's weight: tells models of one shape apart, in no time.

    Of a projection without a dense weight (quantized, sharded, offloaded) everything that it holds is taken instead.
    """
    digest = hashlib.sha256()
    for projection in projections:
        weight = getattr(projection, "weight", None)
        if is_dense(weight) and weight.dim() == 2 and weight.device.type != "meta":
            digest.update(weight[:1].detach().double().cpu().numpy().tobytes())
        else:
            held = projection.state_dict() | plain_attributes(projection)
            for name, value in sorted(held.items()):
                for part in _parts(name, value):
                    digest.update(part)
    return digest.hexdigest()


def _parts(name: str, value: object) -> Iterator[bytes]:
    """A stored value as bytes, whatever kind of tensor it is: its name, its shape and its numbers."""
    if not isinstance(value, Tensor):
        yield f"{name} {value!r}".encode()
    elif hasattr(value, "_local_tensor"):
        yield from _parts(name, value._local_tensor)
    elif hasattr(value, "__tensor_flatten__"):
        inner, _ = value.__tensor_flatten__()
        for attribute in inner:
            yield from _parts(f"{name}.{attribute}", getattr(value, attribute))
    else:
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        # what is offloaded has no numbers here
        if value.device.type != "meta" and value.layout == torch.strided and not value.is_quantized:
            plain = value.detach().cpu().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def dtype_of_run(folder: Path | str) -> str | None:
    """The dtype that the run in a folder was begun in, "bfloat16" say; None where there is no run, or no word of it."""
    try:
        return json.loads((Path(folder) / "state.json").read_text())["identity"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage, or None. A run killed while it wrote one goes on from the one before."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    # Trainer writes this file last
    whole = [step for step, path in steps.items() if (path / "trainer_state.json").is_file()]
    for step in steps.keys() - set(whole):
        shutil.rmtree(steps[step])
    return str(steps[max(whole)]) if whole else None


def _of_a_run(state: object) -> bool:
    """Whether a state.json says what a run's does: others write files of this name too, `datasets` for one."""
    kept = {"stage": str, "identity": dict, "metrics": dict}
    return isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kept.items())


def _parsed(path: Path, text: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
