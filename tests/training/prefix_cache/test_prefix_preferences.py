"""The prefix cache under DPO: references and steps start from the same states."""

import json

import pytest
import torch

import lofit_fast as lf
from lofit_fast.tasks.task import Preference
from lofit_fast.training.fit import fit_preferences
from tests.tiny_models import spread
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.prefix_cache.prefixed import Passes, deep, stores, vectors

pytest.importorskip("trl")

PAIRS = [
    Preference(f"Q: {name}? A:", f" {name}.", tuple(f" {wrong}!" for wrong in "xyz"[: 1 + number % 3]))
    for number, name in enumerate(("ab", "cde", "f", "ghij", "kl", "m"))
]
RECIPE = lf.Recipe(top=2, min_layer=2, tune_epochs=3, batch_size=4)


def fit(model, folder, gb, **changes):
    recipe = lf.Recipe(**{**vars(RECIPE), **changes})
    how = {"engine": lf.Engine(prefix_cache_gb=gb), "heads": [(2, 1), (3, 0)], "progress": False}
    result = fit_preferences(model, tiny_tokenizer(), PAIRS, recipe, output_dir=folder, **how)
    result.handle.unpatch()
    return result


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_dpo_with_the_prefix_cache(cache, tmp_path, family):
    model = spread(deep(family))
    plain = fit(model, tmp_path / "plain", 0.0)
    assert not cache.exists()
    passes = Passes(model)
    result = fit(model, tmp_path / "cached", 1.0)
    assert len(stores(cache / "prefix")) == 1
    losses = [[row["loss"] for row in r.history] for r in (plain, result)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (vectors(result) - vectors(plain)).abs().max() <= 1e-4 * vectors(plain).abs().max()
    below, _, above, _ = passes.take()
    # below: trials, a fill and its proof; above: the reference and three epochs besides
    tokens = sum(len(tiny_tokenizer()(p.prompt + p.chosen)["input_ids"]) for p in PAIRS)
    assert above - below > 6 * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dpo_compares_like_with_like_from_the_cache(cache, tmp_path, dtype):
    model = spread(deep(dtype=dtype))
    result = fit(model, tmp_path / "run", 1.0, init_std=0.0, tune_epochs=1, batch_size=len(PAIRS))
    assert len(stores(cache / "prefix")) == 1
    # in batches of one shape, 16 bits round the reference and the steps alike
    assert result.history[0]["step_losses"][0] == pytest.approx(0.69315, abs=1e-5)


def test_dpo_with_auto(cache, tmp_path, monkeypatch):
    from lofit_fast.training.prefix_cache import worth

    monkeypatch.setattr(worth, "_PER_BYTE", {"cpu": 0.01})
    fit(deep(), tmp_path / "run", "auto", tune_epochs=1)
    kept = json.loads((tmp_path / "run" / "state.json").read_text())["engine"]["tune"]["prefix_cache_gb"]
    # the reference is a pass of its own, so that one epoch is enough
    assert (kept > 0) is (len(stores(cache / "prefix")) == 1) is True
