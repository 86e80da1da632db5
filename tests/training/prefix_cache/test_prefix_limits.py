"""When the prefix cache is another one, when it holds a part of the data, and when there is none."""

import pickle
import shutil
import warnings
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from lofit_fast.training.prefix_cache import below, proven_store
from lofit_fast.training.prefix_cache.cache import STATES, PrefixCollator, prefix_cached
from tests.tiny_models import HIDDEN
from tests.training.prefix_cache.prefixed import COLLATE, HEADS, ROWS, TOKENS, cached, deep, results, stores, tuned


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


def test_prefix_refuses_batches_padded_on_the_left(tmp_path):
    def left(batch):
        return {**COLLATE(batch), "input_ids": COLLATE(batch)["input_ids"].roll(1, 1)}

    handle = tuned(deep())
    with cached(handle, tmp_path / "right") as collate, pytest.raises(ValueError, match="padded on the right"):
        PrefixCollator(left, collate.store)(ROWS[:2])
    with uncached(handle, tmp_path / "left", "padded on the right", collator=left):
        pass


PER_TOKEN = HIDDEN * 4


def test_prefix_keeps_what_the_bound_allows(tmp_path):
    handle = tuned(deep())
    half = TOKENS * PER_TOKEN / 2
    with (
        pytest.warns(UserWarning, match=r"need 1.\d+e-05 GB, the bound is .* of 12 sequences are kept"),
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
    with uncached(tuned(deep()), tmp_path, "need .* GB, the bound is 1e-08 GB", gb=1e-8):
        pass


def test_prefix_minds_a_full_disk(tmp_path, monkeypatch):
    total, used, _ = shutil.disk_usage(tmp_path)
    usage = type(shutil.disk_usage(tmp_path))(total, used, proven_store.RESERVE + 10 * PER_TOKEN)
    monkeypatch.setattr(proven_store.shutil, "disk_usage", lambda path: usage)
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
    monkeypatch.setattr(proven_store, "FILL_TOKENS", 40)
    run, calls = below.Prefix.run, []

    def failing(self, batch):
        calls.append(len(batch))
        if len(calls) == 5:
            raise error("stop")
        return run(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(below.Prefix, "run", failing)
        if error is OSError:
            with uncached(handle, tmp_path, "stop"):
                pass
        else:
            with pytest.raises(KeyboardInterrupt), cached(handle, tmp_path):
                pass
    assert [id(m) for m in model.modules()] == modules
    assert stores(tmp_path) == []
    # a lock stays, and says nothing
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    with cached(handle, tmp_path) as collate:
        assert len(collate.store) == 12


def test_prefix_damaged_in_the_middle_is_said_and_made_anew(tmp_path):
    handle = tuned(deep())
    with cached(handle, tmp_path):
        (path,) = tmp_path.rglob("states.bin")
    content = path.read_bytes()
    # two tokens of one sequence, in each other's place: every number is still there
    at = len(content) // 2 // PER_TOKEN * PER_TOKEN
    swapped = content[at + PER_TOKEN : at + 2 * PER_TOKEN] + content[at : at + PER_TOKEN]
    path.write_bytes(content[:at] + swapped + content[at + 2 * PER_TOKEN :])
    with (
        pytest.warns(UserWarning, match=f"prefix cache: {path} is not what was written: .* made anew"),
        prefix_cached(handle, ROWS, COLLATE, gb=1, folder=tmp_path) as collate,
    ):
        assert isinstance(collate, PrefixCollator)
    assert path.read_bytes() == content


def in_a_process(loader, collate):
    """The states of a data loader's batches are those of this process."""
    for batch, first in zip(loader, range(0, len(ROWS), 4), strict=True):
        assert batch[STATES].equal(collate(ROWS[first : first + 4])[STATES])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["spawn", "fork"])
def test_prefix_in_a_data_loaders_process(tmp_path, way):
    with cached(tuned(deep()), tmp_path) as collate:
        how = {"collate_fn": collate, "num_workers": 1, "multiprocessing_context": way}
        in_a_process(torch.utils.data.DataLoader(ROWS, batch_size=4, **how), collate)


def test_prefix_is_handed_to_a_process_as_the_name_of_its_files(tmp_path):
    with cached(tuned(deep()), tmp_path) as collate:
        handed = ForkingPickler.dumps(collate)
        assert len(handed) < 2000
        in_a_process((pickle.loads(handed)(ROWS[i : i + 4]) for i in range(0, len(ROWS), 4)), collate)
