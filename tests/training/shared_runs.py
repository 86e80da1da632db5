"""One fit in one process and in several, side by side: what is trained, in which ways, and what must be the same."""

import os
import signal
from dataclasses import replace

import torch
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.training import trainer
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import CLOCKED, EXAMPLES, fit, vectors

# of a loss in a history, which has five decimals
LAST_DIGIT = 1.1e-5
SHARED = lf.Recipe(top=3, select_epochs=2, tune_epochs=2, batch_size=6)
# several labels each, and their number differs, so that a mean of the processes' means would be another
UNEVEN = [{"prompt": e["prompt"], "completion": e["completion"] * (1 + i % 4)} for i, e in enumerate(EXAMPLES)]


def changed(**settings):
    return replace(SHARED, **settings)


# ways to train that every kind of several processes takes
WAYS = {
    "accumulated": {"recipe": changed(batch_size=8, accumulation_steps=2)},
    "a short last micro-batch": {"recipe": changed(batch_size=4, accumulation_steps=2), "examples": UNEVEN[:11]},
    "early stop": {"recipe": changed(select="early_stop", select_epochs=4)},
    "bias norm": {"recipe": changed(select="bias_norm")},
    "saliency": {"recipe": changed(select="saliency"), "examples": UNEVEN[:7]},
    "saliency on answers": {"recipe": changed(select="saliency", positions="answer"), "examples": UNEVEN[:7]},
    "random": {"recipe": changed(select="random")},
    "answers alone": {"recipe": changed(positions="answer")},
    "scales in step 2": {"recipe": changed(tune_scales=True)},
    "packed": {"engine": lf.Engine(packing=True, narrow=True)},
    "padded": {"engine": lf.Engine(packing=False, narrow=False, attention="eager")},
    "not grouped": {"engine": lf.Engine(group_by_length=False)},
    "float64": {"dtype": torch.float64},
}


def preferred(model, folder, recipe, **options):
    """A fit of preferences, seven with one to three rejected answers each."""
    rows = [
        {"prompt": f"Q: {x}? A:", "chosen": f" {x}.", "rejected": [f" {y}!" for y in "xyz"[: 1 + i % 3]]}
        for i, x in enumerate(("ab", "cde", "f", "ghij", "kl", "m", "no"))
    ]
    return lf.fit_preferences(model, tiny_tokenizer(), rows, recipe, output_dir=folder, progress=False, **options)


def outcome_of(model, folder, recipe=SHARED, fitting=fit, **options):
    """(heads, scores, history without clocks, vectors) of a fit of a model in this process."""
    result = fitting(model, folder, recipe, **options)
    history = [{key: row[key] for key in row.keys() - CLOCKED} for row in result.history]
    return result.heads, result.scores, history, vectors(result.handle)


def outcome(folder, recipe=SHARED, dtype=torch.float32, model="llama", **options):
    """The same of a tiny model."""
    return outcome_of(tiny_model(model, dtype), folder, recipe, **options)


def outcomes(n, folder, recipe=SHARED, *, limit=60.0, **options):
    """The same in each of n processes of one run. limit: seconds that they may take."""
    return in_processes(n, lambda rank: outcome(folder, recipe, **options), limit=limit, timeout=limit)


def assert_same_outcome(got, expected, tolerance=1e-5):
    """Heads, the losses of every step and epoch, and the vectors."""
    assert got[0] == expected[0]
    if expected[1] is not None:
        torch.testing.assert_close(got[1], expected[1], atol=tolerance, rtol=tolerance)
    assert [row.keys() for row in got[2]] == [row.keys() for row in expected[2]]
    for mine, theirs in zip(got[2], expected[2], strict=True):
        for key in theirs.keys() - {"peak_memory_bytes"}:
            values = [torch.tensor(x, dtype=torch.float64) for x in (mine[key], theirs[key])] if key != "stage" else []
            assert not values or (values[0] - values[1]).abs().max() <= LAST_DIGIT, (key, mine, theirs)
        assert mine["stage"] == theirs["stage"]
    assert all((a - b).abs().max() <= tolerance for a, b in zip(got[3], expected[3], strict=True))


def dying_at(step):
    """Let this process be killed in a step of step 2, once its gradients are there."""
    shared_step, seen = trainer.AttachmentTraining._shared_step, []

    def dying(self, *args):
        if self.args.learning_rate == SHARED.tune_lr:
            seen.append(None)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return shared_step(self, *args)

    trainer.AttachmentTraining._shared_step = dying


class Stop(TrainerCallback):
    """Ctrl-C in the second epoch of step 2."""

    def on_step_begin(self, args, state, control, **_):
        if args.learning_rate == SHARED.tune_lr and state.epoch is not None and state.epoch > 1.2:
            raise KeyboardInterrupt


class Fail(TrainerCallback):
    """A full disk after two steps."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise OSError("disk full")
