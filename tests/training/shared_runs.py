"""One fit in one process and in several, side by side: what must be the same."""

import os
import signal
from dataclasses import replace

import torch

import lofit_fast as lf
from lofit_fast.training import trainer
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model
from tests.training.tiny_runs import CLOCKED, EXAMPLES, fit, vectors

# of a loss in a history, which has five decimals
LAST_DIGIT = 1.1e-5
SHARED = lf.Recipe(top=3, select_epochs=2, tune_epochs=2, batch_size=6)


def outcome(folder, recipe=SHARED, dtype=torch.float32, model="llama", fitting=fit, **options):
    """(heads, scores, history without clocks, vectors) of a fit of a tiny model in this process."""
    result = fitting(tiny_model(model, dtype), folder, recipe, **options)
    history = [{key: row[key] for key in row.keys() - CLOCKED} for row in result.history]
    return result.heads, result.scores, history, vectors(result.handle)


def outcomes(n, folder, recipe=SHARED, **options):
    """The same in each of n processes of one run."""
    return in_processes(n, lambda rank: outcome(folder, recipe, **options))


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


def changed(**settings):
    return replace(SHARED, **settings)


__all__ = ["EXAMPLES", "SHARED"]
