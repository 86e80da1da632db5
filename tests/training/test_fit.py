"""lf.fit on a tiny model: both steps, and what it leaves on disk."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

import lofit_fast as lf
from lofit_fast.heads import select_heads
from lofit_fast.patching.storage import read_adapter
from tests.ordinary_sample import some_now
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model, tokens
from tests.training.tiny_runs import (
    CLOCKED,
    EXAMPLES,
    HELD_OUT,
    RECIPE,
    assert_equal_vectors,
    assert_same_state,
    assert_whole,
    fit,
    state_of,
    vectors,
)


def test_fit_end_to_end(llama, tmp_path):
    base = {name: value.clone() for name, value in llama.state_dict().items()}
    # one batch per epoch, so that losses compare the same examples
    recipe = lf.Recipe(top=3, select_epochs=3, tune_epochs=3, batch_size=len(EXAMPLES))
    result = fit(llama, tmp_path, recipe, eval_data=HELD_OUT)
    assert lf.handle_of(llama) is result.handle
    assert result.handle.config.scale is None
    assert set(result.handle.config.offset) == set(result.heads)
    assert result.handle.n_parameters() == 3 * HEAD_DIM
    assert result.scores.shape == (LAYERS, HEADS)
    assert result.heads == select_heads(result.scores, 3)
    assert [(row["stage"], row["epoch"]) for row in result.history] == [
        (stage, epoch) for stage in ("select", "tune") for epoch in (1, 2, 3)
    ]
    for stage in ("select", "tune"):
        losses = [row["loss"] for row in result.history if row["stage"] == stage]
        assert losses == sorted(losses, reverse=True)
        measured = result.metrics[stage]
        assert measured.keys() == {"seconds", "tokens_per_s", "examples_per_s", "peak_memory_bytes", "exact_match"}
        assert measured["tokens_per_s"] * measured["seconds"] == pytest.approx(3 * len(EXAMPLES) * 8)
    assert all(row["l1"] > 0 for row in result.history if row["stage"] == "select")
    # keys as in the base model, and not one of its numbers moved
    after = llama.state_dict()
    assert after.keys() == base.keys()
    assert all(after[name].equal(value) for name, value in base.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, to be read only, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return fit(tiny_model("llama"), folder, eval_data=HELD_OUT), folder


def test_fit_fills_the_run_folder(finished):
    result, folder = finished
    state = json.loads((folder / "state.json").read_text())
    assert state["stage"] == "done"
    assert state["metrics"] == result.metrics
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "state.json",
        "select",
        "tune",
        "heads.json",
        "history.jsonl",
        "adapter",
    }
    heads = json.loads((folder / "heads.json").read_text())
    assert [tuple(pair) for pair in heads["heads"]] == result.heads
    assert torch.tensor(heads["scores"]).equal(result.scores)
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [{name: value for name, value in row.items() if name != "sha256"} for row in history] == result.history
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for stage in ("select", "tune"):
        (checkpoint,) = (folder / stage).glob("checkpoint-*")
        names = {path.name for path in checkpoint.iterdir()}
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
        assert "model.safetensors" not in names
    assert_whole(folder)


def test_fit_saves_what_it_returns(llama, finished):
    result, folder = finished
    assert_equal_vectors(vectors(lf.load(llama, folder / "adapter")), vectors(result.handle))


# tests/test_heads.py has every count and fraction in the ordinary run
@pytest.mark.parametrize(("top", "count"), some_now([(5, 5), (0.5, 6), (0.01, 1), (1.0, 12)], (5, 5), (0.01, 1)))
def test_fit_keeps_top_heads(llama, tmp_path, top, count):
    result = fit(llama, tmp_path, lf.Recipe(top=top, select_epochs=1, tune_epochs=1))
    assert len(result.heads) == len(set(result.heads)) == count
    assert result.handle.n_parameters() == count * HEAD_DIM


def test_fit_keeps_heads_of_the_upper_layers(llama, tmp_path):
    result = fit(llama, tmp_path, lf.Recipe(top=0.5, min_layer=1, select_epochs=1, tune_epochs=1))
    assert len(result.heads) == HEADS
    assert min(layer for layer, _ in result.heads) >= 1
    # the scores are those of every head, as without
    assert result.scores.isfinite().all()


def test_fit_on_given_heads_skips_step_1(llama, tmp_path):
    heads = [(2, 1), (0, 3)]
    result = fit(llama, tmp_path, heads=heads)
    assert (result.heads, result.scores) == (heads, None)
    assert {row["stage"] for row in result.history} == {"tune"}
    assert result.metrics.keys() == {"tune"}
    assert not (tmp_path / "select").exists()
    assert [tuple(pair) for pair in json.loads((tmp_path / "heads.json").read_text())["heads"]] == heads


def test_fit_on_all_heads_is_fit_on_each_of_them(llama, tmp_path):
    recipe = lf.Recipe(min_layer=1, tune_epochs=1)
    every = [(layer, head) for layer in range(1, LAYERS) for head in range(HEADS)]
    result = fit(llama, tmp_path / "all", recipe, heads="all")
    assert (result.heads, result.scores) == (every, None)
    expected = vectors(result.handle)
    result.handle.unpatch()
    assert_equal_vectors(vectors(fit(llama, tmp_path / "each", recipe, heads=every).handle), expected)
    with pytest.raises(TypeError, match="'all', a list of"):
        fit(llama, tmp_path / "none", recipe, heads="every")


def test_fit_step_2_starts_from_the_base(llama, tmp_path):
    # the same offsets whether step 1 has run before or not
    result = fit(llama, tmp_path / "both")
    expected = vectors(result.handle)
    result.handle.unpatch()
    alone = fit(llama, tmp_path / "alone", heads=result.heads)
    assert_equal_vectors(vectors(alone.handle), expected)


# tests/training/test_determinism.py has one in the ordinary run
@pytest.mark.slow
def test_fit_is_deterministic(llama, tmp_path):
    results = []
    for name in ("first", "second"):
        result = fit(llama, tmp_path / name, RECIPE, eval_data=HELD_OUT)
        results.append(result)
        torch.manual_seed(999)
        result.handle.unpatch()
    first, second = results
    assert first.heads == second.heads
    assert first.scores.equal(second.scores)
    assert_equal_vectors(vectors(first.handle), vectors(second.handle))
    strip = [[{k: v for k, v in row.items() if k not in CLOCKED} for row in r.history] for r in results]
    assert strip[0] == strip[1]


@pytest.mark.slow
def test_fit_depends_on_the_seed(llama, tmp_path):
    results = []
    for seed in (1, 2):
        result = fit(llama, tmp_path / str(seed), lf.Recipe(top=2, select_epochs=1, tune_epochs=1, seed=seed))
        results.append(result.scores)
        result.handle.unpatch()
    assert not results[0].equal(results[1])


# the next test demands more
@pytest.mark.slow
def test_fit_leaves_the_model_usable_elsewhere(llama, tmp_path):
    before = state_of(llama)
    fit(llama, tmp_path).handle.unpatch()
    assert_same_state(llama, before, but=("modes", "config"))


def test_fit_leaves_mode_and_config_alone(llama, tmp_path):
    # `use_cache` in the config decides whether a forward pass returns a cache, and is saved with the model
    before = state_of(llama)
    fit(llama, tmp_path).handle.unpatch()
    assert_same_state(llama, before)


@pytest.mark.parametrize("epochs", [(0, 1), (1, 0)])
def test_fit_without_epochs(llama, tmp_path, epochs):
    select, tune = epochs
    result = fit(llama, tmp_path, lf.Recipe(top=2, select_epochs=select, tune_epochs=tune))
    assert len(result.history) == 1
    assert len(result.heads) == 2


def test_fit_accepts_examples_and_tuples(llama, tmp_path):
    from lofit_fast.tasks import Example

    examples = tuple(Example(e["prompt"], e["completion"]) for e in EXAMPLES)
    result = fit(llama, tmp_path, examples=examples, eval_data=examples[:1])
    assert 0 <= result.metrics["tune"]["exact_match"] <= 1


def test_fit_in_bfloat16_keeps_float32_vectors(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    result = fit(model, tmp_path)
    assert {p.dtype for p in result.handle.parameters()} == {torch.float32}
    assert all(t.dtype == torch.float32 for t in read_adapter(tmp_path / "adapter").tensors.values())


def test_fit_in_float64(tmp_path):
    result = fit(tiny_model("llama", torch.float64), tmp_path)
    assert {p.dtype for p in result.handle.parameters()} == {torch.float64}


def test_fit_merges_into_a_plain_model(llama, tmp_path):
    result = fit(llama, tmp_path)
    with torch.no_grad():
        expected = llama(tokens()).logits
        plain = result.handle.merge()
        assert plain is llama
        assert lf.handle_of(plain) is None
        torch.testing.assert_close(plain(tokens()).logits, expected)
        plain.save_pretrained(tmp_path / "plain")
        reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(reloaded(tokens()).logits, expected)


def test_fit_merges_into_a_model_that_can_be_trained(llama, tmp_path):
    plain = fit(llama, tmp_path).handle.merge()
    assert [name for name, p in plain.named_parameters() if not p.requires_grad] == []
