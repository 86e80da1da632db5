"""The prefix cache: the same losses and gradients without the layers below, and no cache where that would not hold."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch

import lofit_fast as lf
from lofit_fast.encoding import IGNORED
from lofit_fast.training import CompletionCollator, Engine
from lofit_fast.training import prefix as prefix_module
from lofit_fast.training.prefix import STATES, PrefixCollator, prefix_cached
from tests.hook import randomize
from tests.tiny import FAMILIES, HIDDEN, tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

COLLATE = CompletionCollator(0)
HEADS = [(2, 1), (3, 0), (3, 3)]
# four layers whose types differ by place. the window is shorter than the longest sequences; but longer than any
# padding, since sdpa makes NaN of a query whose whole window is padding
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 11, "layer_types": MIXED}
CHANGES = {"gemma2": WINDOW, "gemma3": WINDOW}


def rows(count=12):
    """Sequences of 6 to 16 tokens."""
    result = []
    for seed in range(count):
        ids = tokens(1, 6 + 3 * seed % 11, seed)[0].tolist()
        result.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - 2) + ids[-2:]})
    return result


ROWS = rows()
TOKENS = sum(len(row["input_ids"]) for row in ROWS)


def deep(family="llama", dtype=torch.float32, **changes):
    return tiny_model(family, dtype, num_hidden_layers=4, **{**CHANGES.get(family, {}), **changes})


def tuned(model, heads=HEADS):
    handle = lf.patch(model, lf.LofitConfig(offset=heads))
    randomize(handle, 0.1)
    return handle


@contextmanager
def cached(handle, folder, sequences=ROWS, gb=1.0, collator=COLLATE):
    """The scope under test, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with prefix_cached(handle, sequences, collator, gb=gb, folder=folder) as with_states:
            assert isinstance(with_states, PrefixCollator)
            yield with_states


@contextmanager
def uncached(handle, folder, why, sequences=ROWS, gb=1.0, collator=COLLATE):
    """The scope under test, which must say why it caches nothing."""
    with pytest.warns(UserWarning, match=f"prefix cache off: .*{why}"):
        scope = prefix_cached(handle, sequences, collator, gb=gb, folder=folder)
        given = scope.__enter__()
    try:
        assert given is collator
        yield
    finally:
        scope.__exit__(None, None, None)
    assert stores(folder) == []


def stores(folder):
    return sorted(path.name for path in folder.glob("*") if (path / "index.json").is_file())


def results(handle, batch):
    """Logits and the gradient of their loss, in the model's dtype, as one vector each."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    logits = handle.model(**inputs, use_cache=False).logits.flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(logits, batch["shift_labels"])
    gradients = torch.autograd.grad(loss, list(handle.parameters()))
    return logits.detach().flatten(), torch.cat([gradient.flatten() for gradient in gradients])


def assert_as_accurate(got, plain, exact):
    """The house's rule: within twice the error of the plain pass, or one unit in the last place at the largest."""
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        ulp = torch.finfo(ours.dtype).eps * truth.abs().max()
        error = (ours.double() - truth).abs().max()
        assert error <= max(2 * (theirs.double() - truth).abs().max(), ulp)


class Passes:
    """Counts the tokens, padding included, that go through each of a model's layers."""

    def __init__(self, model):
        self.tokens = [0] * len(model.model.layers)
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda module, args, i=i: self.add(i, args[0]))

    def add(self, layer, states):
        self.tokens[layer] += states.shape[:2].numel()

    def take(self):
        taken, self.tokens = self.tokens, [0] * len(self.tokens)
        return taken


@pytest.mark.parametrize("batch", [[0, 5, 7, 10], [3], [11, 2, 3, 3]], ids=len)
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
    keep = torch.tensor([labels]) != IGNORED
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([[p for row in batch for p in range(len(row["input_ids"]))]]),
        "logits_to_keep": keep,
        "shift_labels": torch.tensor([labels])[keep],
    }


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefix_of_packed_batches(family, tmp_path):
    handle = tuned(deep(family, torch.float64))
    batch = [ROWS[i] for i in (4, 0, 9)]
    plain = results(handle, packed(batch))
    with cached(handle, tmp_path, collator=packed) as collate:
        got = results(handle, collate(batch))
    assert all((a - b).abs().max() <= 1e-13 * b.abs().max() for a, b in zip(got, plain, strict=True))


def test_prefix_refuses_batches_padded_on_the_left(tmp_path):
    def left(batch):
        return {**COLLATE(batch), "input_ids": COLLATE(batch)["input_ids"].roll(1, 1)}

    handle = tuned(deep())
    with cached(handle, tmp_path / "right") as collate, pytest.raises(ValueError, match="padded on the right"):
        PrefixCollator(left, collate.store)(ROWS[:2])
    with uncached(handle, tmp_path / "left", "padded on the right", collator=left):
        pass


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
    model.activation_checkpointing_enable()
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
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    results(handle, COLLATE(ROWS[:2]))


def test_prefix_draws_no_random_numbers(tmp_path):
    handle = tuned(deep())
    before = torch.get_rng_state()
    with cached(handle, tmp_path):
        assert torch.get_rng_state().equal(before)


def perturb(tensor):
    with torch.no_grad():
        tensor[-1, -1] += 1e-3


def eager(model):
    model.set_attn_implementation("eager")


# what changes the states, or cannot
OTHER = {
    "weights": lambda model: perturb(model.model.layers[1].mlp.down_proj.weight),
    "a token's embedding": lambda model: perturb(model.model.embed_tokens.weight),
    "attention": eager,
    "dtype": lambda model: model.double(),
    "norm": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
}
SAME = {
    "a layer above": lambda model: perturb(model.model.layers[2].mlp.down_proj.weight),
    "output layer": lambda model: perturb(model.lm_head.weight),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("change, count", [*((c, 2) for c in OTHER), *((c, 1) for c in SAME)])
def test_prefix_is_keyed_by_what_it_depends_on(tmp_path, change, count):
    model = deep()
    handle = tuned(model)
    with cached(handle, tmp_path):
        pass
    {**OTHER, **SAME}[change](model)
    plain = results(handle, COLLATE(ROWS[:4]))
    with cached(handle, tmp_path) as collate:
        got = results(handle, collate(ROWS[:4]))
    assert all((a - b).abs().max() <= 2e-6 * b.abs().max() for a, b in zip(got, plain, strict=True))
    assert len(stores(tmp_path)) == count


@pytest.mark.parametrize(
    "sequences, heads, count",
    [
        (ROWS[::-1], HEADS, 1),
        (ROWS + ROWS[:3], HEADS, 1),
        (ROWS, [(2, 0)], 1),
        (ROWS[1:], HEADS, 2),
        (ROWS, [(1, 0), (3, 2)], 2),
    ],
)
def test_prefix_is_keyed_by_data_and_layer(tmp_path, sequences, heads, count):
    model = deep()
    handle = tuned(model)
    with cached(handle, tmp_path):
        pass
    handle.unpatch()
    with cached(tuned(model, heads), tmp_path, sequences):
        pass
    assert len(stores(tmp_path)) == count


def test_prefix_store_that_the_model_disagrees_with_is_made_anew(tmp_path):
    # a hook is nothing that a key could see
    model = deep()
    handle = tuned(model)
    with cached(handle, tmp_path):
        pass
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    plain = results(handle, COLLATE(ROWS[:4]))
    with cached(handle, tmp_path) as collate:
        got = results(handle, collate(ROWS[:4]))
    assert len(stores(tmp_path)) == 1
    assert all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in zip(got, plain, strict=True))
    hook.remove()


def test_prefix_off_where_a_layer_reads_from_a_skipped_one(tmp_path):
    model, seen = deep(), {}
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.update(states=output))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + seen.pop("states"))
    with uncached(tuned(model), tmp_path, "KeyError"):
        pass


def test_prefix_off_where_layers_above_take_something_else(tmp_path):
    model, ran = deep(), []
    model.register_forward_pre_hook(lambda module, args: ran.clear())
    model.model.layers[0].register_forward_hook(lambda module, args, output: ran.append(0))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output if ran else 2 * output + 1)
    with uncached(tuned(model), tmp_path, "logits differ by"):
        pass


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x) if self.training else x


def with_noise():
    model = deep()
    model.model.layers[1].mlp.act_fn = Noise()
    return model


def with_nan():
    model = deep()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    return model


def with_dropout():
    model = deep()
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.3))
    return model


@pytest.mark.parametrize(
    "model, why",
    [
        (lambda: deep(attention_dropout=0.1), "LlamaAttention has attention_dropout=0.1"),
        (with_dropout, "Dropout has p=0.3"),
        (with_noise, "something else in training mode"),
        (with_nan, "not finite"),
    ],
)
def test_prefix_off_where_no_two_passes_are_the_same(tmp_path, model, why):
    with uncached(tuned(model()), tmp_path, why):
        pass


def test_prefix_off_where_layer_0_is_tuned(tmp_path):
    with uncached(tuned(deep(), [(0, 1), (3, 2)]), tmp_path, r"layer 0 is tuned.*--min-layer"):
        pass


def test_prefix_off_where_layers_below_are_trained(tmp_path):
    handle = tuned(deep())
    handle.model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with uncached(handle, tmp_path, "are trained too"):
        pass


def test_prefix_off_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with uncached(tuned(deep()), tmp_path / "file" / "prefix", "cannot write"):
        pass


def test_prefix_of_no_gigabytes_is_silent(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prefix_cached(tuned(deep()), ROWS, COLLATE, gb=0, folder=tmp_path) as given:
            assert given is COLLATE
    assert list(tmp_path.iterdir()) == []


PER_TOKEN = HIDDEN * 4


def test_prefix_keeps_what_the_bound_allows(tmp_path):
    handle = tuned(deep())
    half = TOKENS * PER_TOKEN / 2
    with (
        pytest.warns(UserWarning, match=r"needs 1.\d+e-05 GB, the bound is .* of 12 sequences are kept"),
        prefix_cached(handle, ROWS, COLLATE, gb=half / 1e9, folder=tmp_path) as collate,
    ):
        kept = [collate.store.find(row["input_ids"]) is not None for row in ROWS]
        lengths = [len(row["input_ids"]) for row in ROWS]
        assert 0 < sum(kept) < 12
        assert max(n for n, k in zip(lengths, kept, strict=True) if k) <= min(
            n for n, k in zip(lengths, kept, strict=True) if not k
        )
        assert half - 16 * PER_TOKEN <= collate.store.states.nbytes <= half
    # all of it, once there is room; and that does for less from then on
    with cached(handle, tmp_path) as collate:
        assert len(collate.store) == 12
    assert len(stores(tmp_path)) == 1


def test_prefix_off_where_nothing_fits(tmp_path):
    with uncached(tuned(deep()), tmp_path, "needs .* GB, the bound is 1e-08 GB", gb=1e-8):
        pass


def test_prefix_minds_a_full_disk(tmp_path, monkeypatch):
    import shutil

    total, used, _ = shutil.disk_usage(tmp_path)
    usage = type(shutil.disk_usage(tmp_path))(total, used, prefix_module.RESERVE + 10 * PER_TOKEN)
    monkeypatch.setattr(prefix_module.shutil, "disk_usage", lambda path: usage)
    handle = tuned(deep())
    with (
        pytest.warns(UserWarning, match="the disk has room for .* 1 of 12 sequences"),
        prefix_cached(handle, ROWS, COLLATE, gb=1, folder=tmp_path) as collate,
    ):
        assert len(collate.store) == 1


def test_prefix_of_others_makes_way(tmp_path):
    model = deep()
    bound = 1.5 * TOKENS * PER_TOKEN / 1e9
    for heads in ([(2, 0)], [(1, 0)]):
        handle = tuned(model, heads)
        with cached(handle, tmp_path, gb=bound):
            pass
        handle.unpatch()
    assert len(stores(tmp_path)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_prefix_interrupted_while_filling(tmp_path, monkeypatch, error):
    model = deep()
    handle = tuned(model)
    modules = [id(m) for m in model.modules()]
    monkeypatch.setattr(prefix_module, "FILL_TOKENS", 40)
    run, calls = prefix_module._Prefix.run, []

    def failing(self, batch):
        calls.append(len(batch))
        if len(calls) == 5:
            raise error("stop")
        return run(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(prefix_module._Prefix, "run", failing)
        if error is OSError:
            with uncached(handle, tmp_path, "stop"):
                pass
        else:
            with pytest.raises(KeyboardInterrupt), cached(handle, tmp_path):
                pass
    assert [id(m) for m in model.modules()] == modules
    assert stores(tmp_path) == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with cached(handle, tmp_path) as collate:
        assert len(collate.store) == 12


EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
HELD_OUT = [{"prompt": "a+x=", "completion": "xa"}, {"prompt": "bb+w=", "completion": "wb"}]
RECIPE = lf.Recipe(top=2, min_layer=2, select_epochs=1, tune_epochs=3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fit(model, folder, gb=1.0, **options):
    engine = Engine(prefix_cache_gb=gb)
    options = {"eval_data": HELD_OUT, "progress": False, "engine": engine, **options}
    result = lf.fit(model, tiny_tokenizer(), EXAMPLES, RECIPE, output_dir=folder, **options)
    result.handle.unpatch()
    return result


def vectors(result):
    return torch.cat([parameter.detach().flatten() for parameter in result.handle.parameters()])


def losses(result):
    return [value for row in result.history for value in (row["loss"], row["eval_loss"])]


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
    # every example has the same number of tokens, and an end token
    length = taken[1][0] // 4
    # one fill for both; each run proves it on one sequence twice, and on two at once
    assert [t[0] for t in taken] == [t[1] for t in taken] == [(len(EXAMPLES) + 4) * length, 4 * length]
    assert taken[0][2:] == taken[1][2:] == [(3 * len(EXAMPLES) + 4) * length] * 2
    assert len(stores(cache / "prefix")) == 1


def test_fit_goes_on_with_the_prefix_cache(cache, tmp_path, monkeypatch):
    from lofit_fast.training.run import RunFolder

    model = deep()
    whole = fit(model, tmp_path / "whole", heads=[(2, 1)], eval_data=None)
    append = RunFolder.append_history

    def raising(self, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        append(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "append_history", raising)
        with pytest.raises(KeyboardInterrupt):
            fit(model, tmp_path / "run", heads=[(2, 1)], eval_data=None)
    resumed = fit(model, tmp_path / "run", heads=[(2, 1)], eval_data=None)
    assert vectors(resumed).equal(vectors(whole))
    assert len(stores(cache / "prefix")) == 1
