"""Both steps of fit against a hook-based LoFiT in a plain loop: the same batches in the same order, the same result."""

from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, HookStep, train_hook, vectors_of
from benchmarks.speed.step.losses import recorded_batches
from lofit_fast.heads import jaccard
from tests.tiny_models import LAYERS, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [
    {"prompt": f"{a}+{b}=", "completion": (b + a) * n} for n in (1, 2) for a, b in zip("abcdef", "uvwxyz", strict=True)
]
RECIPE = lf.Recipe(top=4, select_epochs=3, tune_epochs=3, batch_size=4, l1=2e-3, init_std=1e-2)


def hook_on(model, config):
    """A hook that starts from the very vectors that lofit_fast starts from."""
    handle = lf.patch(model, config)
    vectors = vectors_of(handle)
    handle.unpatch()
    return HookLofit(model, vectors)


def config(**heads):
    return lf.LofitConfig(init_std=RECIPE.init_std, seed=RECIPE.seed, **heads)


def losses_of(result, stage):
    return [row["loss"] for row in result.history if row["stage"] == stage]


@pytest.mark.parametrize(("family", "scales"), [("llama", False), ("gemma3", False), ("llama", True)])
def test_parity_of_both_steps(family, scales, tmp_path):
    model, recipe = tiny_model(family), replace(RECIPE, tune_scales=scales)
    with recorded_batches(model) as recorded:
        result = lf.fit(model, tiny_tokenizer(), EXAMPLES, recipe, output_dir=tmp_path, progress=False)
    tuned = vectors_of(result.handle)
    result.handle.unpatch()
    assert len(recorded) == 3 * (3 + 3)
    epochs = [recorded[i : i + 3] for i in range(0, len(recorded), 3)]
    # every example once an epoch, in another order each time
    assert len({str([batch["input_ids"].tolist() for batch in epoch]) for epoch in epochs[:3]}) == 3
    assert all(sum(len(batch["labels"]) for batch in epoch) == len(EXAMPLES) for epoch in epochs)

    hook = hook_on(model, config(scale="all"))
    losses = train_hook(model, hook, epochs[:3], HookStep(RECIPE.select_lr, RECIPE.l1))
    hook.remove()
    scores = torch.stack([hook.parameters[n, "scale"].detach().norm(dim=1) for n in range(LAYERS)])
    heads = lf.select_heads(scores, RECIPE.top)
    assert losses_of(result, "select") == pytest.approx(losses, rel=1e-4)
    assert (scores - result.scores).abs().max() <= 1e-4 * scores.max()
    assert jaccard(heads, result.heads) >= 0.9

    hook = hook_on(model, config(offset=heads, scale=heads if scales else None))
    losses = train_hook(model, hook, epochs[3:], HookStep(RECIPE.tune_lr))
    hook.remove()
    assert losses_of(result, "tune") == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    assert {name for _, name in tuned} == {"offset", *["scale"] * scales}
    for key, (_, rows) in tuned.items():
        other = hook.parameters[key].detach()
        assert (rows - other).abs().max() <= 1e-4 * other.abs().max()
