"""What is killed: trainings, sweeps, exports and fills of caches on a tiny base, each as a call that can be made again.

Each works in one folder, and goes on with what an earlier call has left there. Caches are in the folder too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import lofit_fast as lf
from benchmarks.proof.reliability.tiny_base import (
    EXAMPLES,
    HELD_OUT,
    LAST_HEADS,
    PREFERENCES,
    RECIPE,
    character_tokenizer,
    filled_vectors,
    save_base,
    tiny_base,
)

# the first and the second adapter of a folder that is saved twice: other heads, as many
_FIRST, _SECOND = [(0, 1), (1, 0)], [(0, 2), (2, 3)]


def _nothing(folder: Path) -> None:
    """Nothing is there beforehand, and nothing can be wrong meanwhile."""


@dataclass(frozen=True)
class Work:
    """run: the call. prepare: what is there before it, made whole. check: what is wrong after a kill, in a sentence.

    optional: whether it writes a cache that a run goes on without, to rounding, where the disk does not take it.
    """

    run: Callable[[Path], object]
    prepare: Callable[[Path], object] = _nothing
    check: Callable[[Path], str | None] = _nothing
    optional: bool = False


def _fit(folder: Path, examples=EXAMPLES, recipe: lf.Recipe = RECIPE, **options) -> None:
    how = {"output_dir": folder / "run", "progress": False, **options}
    lf.fit(tiny_base(), character_tokenizer(), examples, recipe, **how).handle.unpatch()


def fit_both_steps(folder: Path) -> None:
    """Both steps, with an evaluation after every epoch."""
    _fit(folder, eval_data=HELD_OUT)


def fit_with_prefix(folder: Path) -> None:
    """Step 2 with the prefix cache."""
    _fit(folder, heads=LAST_HEADS, engine=lf.Engine(prefix_cache_gb=0.1))


def fit_with_prompts(folder: Path) -> None:
    """Step 2 of vectors that act on answers, with the prompts' keys and values kept."""
    recipe = lf.Recipe(tune_epochs=2, batch_size=4, positions="answer")
    _fit(folder, recipe=recipe, heads=LAST_HEADS, engine=lf.Engine(prompt_cache_gb=0.1))


def fit_preferences(folder: Path) -> None:
    """Both steps of DPO."""
    recipe = lf.Recipe(top=2, select_epochs=2, tune_epochs=2, batch_size=2)
    how = {"output_dir": folder / "run", "progress": False}
    lf.fit_preferences(tiny_base(), character_tokenizer(), PREFERENCES, recipe, **how).handle.unpatch()


def train_command(folder: Path) -> None:
    """The command, with its summary and plots."""
    base = save_base(folder)
    of_data = ("--model", base, "--data", folder / "data.jsonl", "--output", folder / "run")
    _command("train", *of_data, *_QUICK)


_QUICK = (
    *("--dtype", "float32", "--device", "cpu", "--top", "2"),
    *("--batch-size", "4", "--select-epochs", "1", "--tune-epochs", "2"),
)


# as which a run of a sweep reports what the system refuses
_SYSTEMS_ERRORS = ("OSError", "WriteError", "PermissionError")


def sweep_runs(folder: Path) -> None:
    """Three runs, of which two share their step 1."""
    from lofit_fast.training.sweep.grid import parse_grid
    from lofit_fast.training.sweep.run import sweep

    common = {"model": str(save_base(folder)), "task": "completion", "data": str(folder / "data.jsonl")}
    common |= {"dtype": "float32", "device": "cpu", "top": 2, "select_epochs": 1, "tune_epochs": 1, "batch_size": 4}
    varied = [{"tune_lr": 0.01}, {"tune_lr": 0.02}, {"select_lr": 0.01}]
    rows = sweep(parse_grid({"base": common, "runs": varied}), folder / "sweep", progress=False)
    for row in rows:
        if row["status"] != "done":
            kind, _, message = row["error"].partition(": ")
            raise OSError(message) if kind in _SYSTEMS_ERRORS else RuntimeError(row["error"])


def export_plain(folder: Path) -> None:
    """A plain folder of the merged model."""
    handle = filled_vectors(lf.patch(tiny_base(), lf.LofitConfig(offset=_FIRST)))
    lf.export(handle, folder / "plain", character_tokenizer())


def save_over(folder: Path) -> None:
    """An adapter over one of other heads."""
    _saved(folder, _SECOND)


def _saved(folder: Path, heads) -> None:
    filled_vectors(lf.patch(tiny_base(), lf.LofitConfig(offset=heads))).save(folder / "adapter")


def one_of_both(folder: Path) -> str | None:
    """What is wrong with an adapter that is saved over another: it must be the first or the second, all of it."""
    try:
        handle = lf.load(tiny_base(), folder / "adapter")
    except (ValueError, OSError) as error:
        return f"neither the old adapter nor the new one can be loaded: {error}"
    got = dict(handle.named_parameters())
    for heads in (_FIRST, _SECOND):
        wanted = dict(filled_vectors(lf.patch(tiny_base(), lf.LofitConfig(offset=heads))).named_parameters())
        of_these = handle.config.offset == tuple(heads)
        if of_these and got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted):
            return None
    return f"heads {handle.config.offset} with vectors of neither adapter"


def convert_gguf(folder: Path) -> torch.nn.Module:
    """A GGUF file, which a stand-in for transformers' reader reads, and the model from its conversion."""
    import transformers

    from lofit_fast.models.load import load_model

    file = folder / "some.gguf"
    if not file.is_file():
        file.write_bytes(_gguf_header({"general.architecture": "llama"}))
    _read_gguf_as(transformers.AutoModelForCausalLM, tiny_base)
    _read_gguf_as(transformers.AutoTokenizer, character_tokenizer)
    return load_model(str(file), dtype="float32", device="cpu")[0]


def _gguf_header(entries: dict[str, str]) -> bytes:
    """A GGUF file of version 3 with these entries and no tensors."""
    # 8: a string
    words = (_counted(name) + struct.pack("<I", 8) + _counted(value) for name, value in entries.items())
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(words)


def _counted(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _read_gguf_as(kind: type, made: Callable[[], object]) -> None:
    """Let a class of transformers make this of every GGUF file, for the rest of the process."""
    read = kind.from_pretrained
    if read.__name__ == "stand_in":
        return

    def stand_in(*arguments, gguf_file=None, output_loading_info=False, **options):
        if gguf_file is None:
            told = {"output_loading_info": True} if output_loading_info else {}
            return read(*arguments, **told, **options)
        return (made(), {"missing_keys": [], "unexpected_keys": []}) if output_loading_info else made()

    kind.from_pretrained = stand_in


def autotune_paths(folder: Path) -> None:
    """The answers of a device, measured and kept."""
    from lofit_fast.models import op_paths

    layers = op_paths.layers_of(str(save_base(folder)))
    op_paths.measure_paths(layers, ["all"], [16], torch.float32, torch.device("cpu"), rounds=1)


def answers_are_whole(folder: Path) -> str | None:
    """What is wrong with the kept answers: a file that is there must be one that is used."""
    import json

    # a process that was killed leaves its name beside its lock
    for file in (folder / "cache" / "autotune").glob("*.json"):
        if not file.name.endswith(".owner.json") and not json.loads(file.read_text()).get("answers"):
            return f"{file.name} holds no answers"
    return None


def _command(*arguments: object) -> None:
    """A command of lofit-fast in this process. Raises OSError with what it printed where it ends with an error."""
    from typer.testing import CliRunner

    from lofit_fast.cli.app import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise OSError(" ".join(result.stderr.split()))


WORKS: dict[str, Work] = {
    "fit": Work(fit_both_steps),
    "prefix cache": Work(fit_with_prefix, optional=True),
    "prompt cache": Work(fit_with_prompts, optional=True),
    "preferences": Work(fit_preferences),
    "train command": Work(train_command, prepare=save_base),
    "sweep": Work(sweep_runs, prepare=save_base),
    "export": Work(export_plain),
    "save over": Work(save_over, prepare=lambda folder: _saved(folder, _FIRST), check=one_of_both),
    "conversion": Work(convert_gguf),
    "autotune": Work(autotune_paths, prepare=save_base, check=answers_are_whole),
}
