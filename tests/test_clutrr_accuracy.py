"""The paper's CLUTRR recipe on a real model and the real data, against an independent hook on the same batches.

Needs the packaged SmolLM2 and a data folder: `make real DATA=DIR`. Takes about 25 minutes on two CPU cores.
"""

import json
import os
from pathlib import Path

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, HookStep, train_hook, vectors_of
from benchmarks.speed.step.losses import recorded_batches
from lofit_fast.config import RECIPES
from lofit_fast.evaluation.judge import exact_match_accuracy
from lofit_fast.heads import jaccard
from lofit_fast.models.load import load_model
from lofit_fast.tasks import load_task

DATA = os.environ.get("LOFIT_FAST_DATA")
RECIPE = lf.Recipe(**RECIPES["clutrr"], top=0.1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not DATA, reason="needs the CLUTRR splits: make real DATA=DIR"),
]


@pytest.fixture(scope="module")
def base():
    """SmolLM2 in float32 and its tokenizer, with all the threads that the quick tests do without."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield load_model("smollm2", dtype="float32")
    torch.set_num_threads(threads)


def test_fit_equals_an_independent_hook(base, tmp_path):
    model, tokenizer = base
    task = load_task("clutrr", DATA, train_size=300)
    with recorded_batches(model) as recorded:
        result = lf.fit(model, tokenizer, task.train, RECIPE, output_dir=tmp_path, progress=False)
    ours = exact_match_accuracy(model, tokenizer, task.validation)
    result.handle.unpatch()

    per_epoch = len(recorded) // (RECIPE.select_epochs + RECIPE.tune_epochs)
    epochs = [recorded[i : i + per_epoch] for i in range(0, len(recorded), per_epoch)]
    select, losses = HookStep(RECIPE.select_lr, RECIPE.l1), []
    hook = _hook(model, lf.LofitConfig(scale="all"))
    losses += train_hook(model, hook, epochs[: RECIPE.select_epochs], select)
    scores = torch.stack([hook.parameters[n, "scale"].detach().norm(dim=1) for n in range(len(model.model.layers))])
    hook.remove()
    hook_heads = lf.select_heads(scores, RECIPE.top)
    hook = _hook(model, lf.LofitConfig(offset=hook_heads))
    losses += train_hook(model, hook, epochs[RECIPE.select_epochs :], HookStep(RECIPE.tune_lr))
    model.eval()
    hooked = exact_match_accuracy(model, tokenizer, task.validation)
    hook.remove()

    report = {
        "exact_match": ours,
        "hook_exact_match": hooked,
        "losses": [row["loss"] for row in result.history],
        "hook_losses": losses,
        "jaccard": jaccard(result.heads, hook_heads),
    }
    Path("runs").mkdir(exist_ok=True)
    Path("runs/clutrr_parity.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    assert ours >= 0.25
    assert ours >= hooked - 0.03
    assert report["jaccard"] >= 0.9
    assert report["losses"] == pytest.approx(losses, rel=0.01)


def _hook(model, config) -> HookLofit:
    """A hook that starts from the vectors a handle of this config would start from."""
    handle = lf.patch(model, config)
    vectors = vectors_of(handle)
    handle.unpatch()
    return HookLofit(model, vectors)
