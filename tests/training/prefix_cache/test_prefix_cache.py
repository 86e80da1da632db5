"""The prefix cache: the same losses and gradients, without the layers below."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from lofit_fast.cpu.attention import GROUPED, register
from lofit_fast.data.collate import kept
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import PackedCollator
from lofit_fast.training import CompletionCollator, Engine, prepared
from lofit_fast.training.engine import compiled_layers
from lofit_fast.training.prefix_cache.cache import STATES
from tests.library_versions import BY_ROW
from tests.ordinary_sample import crossed
from tests.tiny_models import FAMILIES, HIDDEN, tokens
from tests.training.prefix_cache.prefixed import (
    COLLATE,
    EXAMPLES,
    MIXED,
    ROWS,
    TOKENS,
    Passes,
    cached,
    deep,
    fit,
    losses,
    results,
    stopped,
    stores,
    tuned,
    vectors,
)


def assert_as_accurate(got, plain, exact):
    """The house's rule: within twice the error of the plain pass, or one unit in the last place at the largest."""
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        ulp = torch.finfo(ours.dtype).eps * truth.abs().max()
        error = (ours.double() - truth).abs().max()
        assert error <= max(2 * (theirs.double() - truth).abs().max(), ulp)


# in the ordinary run each family with one batch, here and below; slow: with every one
@pytest.mark.parametrize("family, batch", crossed(FAMILIES, [[0, 5, 7, 10], [3], [11, 2, 3, 3]]))
def test_prefix_changes_neither_logits_nor_gradients(family, tmp_path, batch):
    model, batch = deep(family), [ROWS[i] for i in batch]
    handle = tuned(model)
    exact = tuned(deep(family, torch.float64))
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), handle.parameters(), strict=True):
            ours.copy_(theirs)
    plain = results(handle, COLLATE(batch))
    with cached(handle, tmp_path) as collate:
        assert_as_accurate(results(handle, collate(batch)), plain, results(exact, COLLATE(batch)))


# gemma2's soft-capped attention takes its softmax in float32, whatever the model's dtype
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_prefix_in_float64_is_exact(family, tmp_path):
    handle = tuned(deep(family, torch.float64))
    plain = results(handle, COLLATE(ROWS[:5]))
    with cached(handle, tmp_path) as collate:
        for got, expected in zip(results(handle, collate(ROWS[:5])), plain, strict=True):
            assert (got - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_prefix_layer_types_matter_here(family):
    # what the tests above would not notice if it did not
    handle = tuned(deep(family))
    shifted = tuned(deep(family, layer_types=MIXED[2:] + MIXED[1::-1]))
    logits = [results(h, COLLATE(ROWS[:5]))[0] for h in (handle, shifted)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_prefix_in_bfloat16(tmp_path):
    handle = tuned(deep("gemma3", torch.bfloat16))
    plain, exact = results(handle, COLLATE(ROWS[:5])), tuned(deep("gemma3", torch.bfloat16).double())
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), handle.parameters(), strict=True):
            ours.copy_(theirs)
    with cached(handle, tmp_path) as collate:
        batch = collate(ROWS[:5])
        assert batch[STATES].dtype == torch.bfloat16
        assert_as_accurate(results(handle, batch), plain, results(exact, COLLATE(ROWS[:5])))


def packed(batch):
    """Rows end to end in one, positions starting anew."""
    ids = [i for row in batch for i in row["input_ids"]]
    labels = [label for row in batch for label in [*row["labels"][1:], IGNORED]]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([[p for row in batch for p in range(len(row["input_ids"]))]]),
        **kept(torch.tensor([labels]), BY_ROW),
    }


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefix_of_packed_batches(family, tmp_path):
    handle = tuned(deep(family, torch.float64))
    batch = [ROWS[i] for i in (4, 0, 9)]
    plain = results(handle, packed(batch))
    with cached(handle, tmp_path, collator=packed) as collate:
        got = results(handle, collate(batch))
    assert all((a - b).abs().max() <= 1e-13 * b.abs().max() for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("family, shared", crossed(FAMILIES, [3, 0]))
def test_prefix_of_batches_with_a_shared_beginning(family, shared, tmp_path):
    handle = tuned(deep(family, torch.float64))
    register()
    handle.model.set_attn_implementation(GROUPED)
    beginning = tokens(1, 4, 99)[0].tolist()[:shared]
    rows = [
        {"input_ids": beginning + row["input_ids"], "labels": [IGNORED] * shared + row["labels"]}
        for row in (ROWS[4], ROWS[0], ROWS[9])
    ]
    collator = PackedCollator(0, logits=BY_ROW)
    plain = results(handle, collator(rows))
    with cached(handle, tmp_path, rows, collator=collator) as collate:
        batch = collate(rows)
        assert batch[STATES].shape == (*batch["input_ids"].shape, HIDDEN)
        # rounding apart: transformers' norms are float32 in any dtype
        for got, expected in zip(results(handle, batch), plain, strict=True):
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("logits", ["columns", "all"])
def test_prefix_of_models_that_take_no_mask(logits, tmp_path):
    # their logits stand at padding too, of which there are no states
    handle, collator = tuned(deep()), CompletionCollator(0, logits=logits)
    parameters = list(handle.parameters())

    def found(batch):
        loss = handle.model(**{**batch, "use_cache": False}).loss
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    plain = found(collator(ROWS[:5]))
    with cached(handle, tmp_path, collator=collator) as collate:
        for got, expected in zip(found(collate(ROWS[:5])), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_prefix_layers_run_once(tmp_path):
    model = deep()
    handle, passes = tuned(model), Passes(model)
    # the shortest twice, to see that training changes nothing, and with the longest once, to compare
    proof = 2 * 6 + 2 * 16
    with cached(handle, tmp_path) as collate:
        first, second, *_ = passes.take()
        assert first == second >= TOKENS + proof
        for _ in range(3):
            batch = collate(ROWS[:4])
            results(handle, batch)
        width = batch["input_ids"].numel()
        assert passes.take() == [0, 0, 3 * width, 3 * width]
    # another run on the same model and data
    handle.unpatch()
    with cached(tuned(model), tmp_path):
        assert passes.take()[:2] == [proof, proof]
    assert len(stores(tmp_path)) == 1


def test_prefix_batch_with_an_unknown_row_runs_in_full(tmp_path):
    model = deep()
    handle, passes = tuned(model), Passes(model)
    with cached(handle, tmp_path, ROWS[:6]) as collate:
        passes.take()
        batch = collate(ROWS[4:8])
        assert STATES not in batch
        got = results(handle, batch)
        assert set(passes.take()) == {batch["input_ids"].numel()}
    assert all(a.equal(b) for a, b in zip(got, results(handle, COLLATE(ROWS[4:8])), strict=True))


def test_prefix_batch_holds_tokens_states_and_zeros(tmp_path):
    with cached(tuned(deep()), tmp_path) as collate:
        batch = collate(ROWS[:3])
        assert batch[STATES].shape == (*batch["input_ids"].shape, HIDDEN)
        there = batch[STATES].abs().sum(-1) > 0
        assert there.equal(batch["attention_mask"].bool())


def test_prefix_under_activation_checkpointing(tmp_path):
    model = deep()
    handle = tuned(model)
    plain = results(handle, COLLATE(ROWS[:4]))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    passes = Passes(model)
    with cached(handle, tmp_path) as collate:
        passes.take()
        model.train()
        batch = collate(ROWS[:4])
        got = results(handle, batch)
        # forward hooks stay outside the recomputation
        assert passes.take()[:2] == [0, 0]
        # a batch in full builds no graph below either
        assert results(handle, COLLATE(ROWS[:4]))[1].equal(plain[1])
    assert all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_prefix_leaves_no_trace(tmp_path, error):
    model = deep("gemma3")
    handle = tuned(model)
    before = ([id(m) for m in model.modules()], [m.training for m in model.modules()], copy.deepcopy(model.config))
    hooks = list(model._forward_hooks), list(model._forward_pre_hooks)
    try:
        with cached(handle, tmp_path):
            assert [id(m) for m in model.modules()] != before[0]
            # what a model may ask its layers for
            assert model.model.layers[0].self_attn.layer_type == "sliding_attention"
            assert len(model.model.layers) == 4
            if error:
                raise error
    except RuntimeError:
        pass
    assert ([id(m) for m in model.modules()], [m.training for m in model.modules()]) == before[:2]
    assert model.config.to_dict() == before[2].to_dict()
    assert (list(model._forward_hooks), list(model._forward_pre_hooks)) == hooks
    results(handle, COLLATE(ROWS[:2]))


def test_prefix_draws_no_random_numbers(tmp_path):
    handle = tuned(deep())
    before = torch.get_rng_state()
    with cached(handle, tmp_path):
        assert torch.get_rng_state().equal(before)


def test_fit_with_the_prefix_cache(cache, tmp_path):
    model = deep("gemma3")
    plain = fit(model, tmp_path / "plain", gb=0.0)
    assert not cache.exists()
    result = fit(model, tmp_path / "cached")
    assert len(stores(cache / "prefix")) == 1
    assert result.heads == plain.heads
    assert losses(result) == pytest.approx(losses(plain), rel=1e-5)
    assert result.metrics["tune"]["exact_match"] == plain.metrics["tune"]["exact_match"]
    assert (vectors(result) - vectors(plain)).abs().max() <= 1e-4 * vectors(plain).abs().max()
    # what the layers below cost is counted where it is paid
    assert result.metrics["tune"]["seconds"] > sum(row["seconds"] for row in result.history if row["stage"] == "tune")


def test_fit_shares_the_prefix_with_other_runs(cache, tmp_path):
    model = deep()
    passes, taken = Passes(model), []
    for name in ("first", "second"):
        fit(model, tmp_path / name, heads=[(2, 1), (3, 0)], eval_data=None)
        taken.append(passes.take())
    # of every example, an end token among them
    length = 8
    # one fill for both; each run proves it on one sequence twice, and on two at once, after the same trials
    trials = taken[1][0] - 4 * length
    assert [t[0] for t in taken] == [t[1] for t in taken] == [trials + (len(EXAMPLES) + 4) * length, taken[1][0]]
    assert taken[0][2:] == taken[1][2:] == [trials + (3 * len(EXAMPLES) + 4) * length] * 2
    assert len(stores(cache / "prefix")) == 1


def test_fit_goes_on_with_the_prefix_cache(cache, tmp_path, monkeypatch):
    model = deep()
    whole = fit(model, tmp_path / "whole", heads=[(2, 1)], eval_data=None)
    with stopped(monkeypatch):
        fit(model, tmp_path / "run", heads=[(2, 1)], eval_data=None)
    resumed = fit(model, tmp_path / "run", heads=[(2, 1)], eval_data=None)
    assert vectors(resumed).equal(vectors(whole))
    assert len(stores(cache / "prefix")) == 1


@pytest.mark.slow
def test_prefix_with_compiled_layers(tmp_path, monkeypatch, dynamo):
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    handle = tuned(deep())
    plain = results(handle, COLLATE(ROWS[:4]))
    counters.clear()
    with prepared(handle.model, Engine(compile=True)), cached(handle, tmp_path) as collate:
        # the fill and its proof ran eagerly
        assert counters["frames"]["total"] == 0
        got = results(handle, collate(ROWS[:4]))
        assert counters["frames"]["total"] > 0
    assert all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in zip(got, plain, strict=True))
