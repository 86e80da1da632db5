"""When "auto" keeps a prefix cache: a count of operations and bytes, and the room of a disk."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import loreft
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.training.dry_run import dry_run
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.auto import said
from lofit_fast.training.objectives import Completions
from lofit_fast.training.prefix_cache import proven_store, worth
from lofit_fast.training.prefix_cache.worth import settled_prefix, worth_of
from tests.tiny_models import HIDDEN
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.prefix_cache.prefixed import (
    EXAMPLES,
    HELD_OUT,
    RECIPE,
    ROWS,
    TOKENS,
    deep,
    fit,
    losses,
    stopped,
    stores,
    tuned,
    vectors,
)


@pytest.fixture
def free(monkeypatch):
    """Bytes as cheap as on a fast disk, which tiny layers would not pay for, and a disk with 101 GB free."""
    disk = SimpleNamespace(free=101 * 10**9)
    monkeypatch.setattr(worth, "_PER_BYTE", {"cpu": 0.01})
    monkeypatch.setattr(worth.shutil, "disk_usage", lambda path: disk)
    return disk


def test_worth_is_the_count_by_hand(tmp_path, free):
    handle, epochs = tuned(deep()), 5
    found = worth_of(handle, ROWS, epochs * TOKENS, tmp_path)
    weights = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(handle.model)]
    below, above = sum(weights[:2]), sum(weights[2:])
    size, labels = TOKENS * HIDDEN * 4, epochs * 2 * len(ROWS)
    head = 4 * labels * handle.model.config.vocab_size * HIDDEN
    saved = 2 * below * (epochs - 1) * TOKENS - 0.01 * (4 * below + (3 + epochs) * size)
    assert found.saved == pytest.approx(saved / (epochs * TOKENS * (2 * below + 4 * above) + head))
    assert (found.layers, found.tokens, found.passes, found.bytes) == (2, TOKENS, epochs, size)
    assert (found.room, found.gb, found.refusal) == (10 * 10**9, 10.0, None)


def test_one_sequence_many_times_is_kept_once(tmp_path, free):
    found = worth_of(tuned(deep()), ROWS + ROWS, 4 * TOKENS, tmp_path)
    assert (found.tokens, found.passes) == (TOKENS, 4)


@pytest.mark.parametrize(
    ("heads", "passes", "gigabytes", "why"),
    [
        ([(2, 1)], 1, 101, "save -?[0-9]+% of the operations"),
        ([(0, 1), (3, 0)], 5, 101, "layer 0 is tuned"),
        ([(2, 1)], 5, 1, "tenth of the disk's room is 0 GB"),
    ],
)
def test_auto_keeps_nothing_where_it_does_not_pay(tmp_path, free, heads, passes, gigabytes, why):
    free.free = gigabytes * 10**9
    found = worth_of(tuned(deep(), heads), ROWS, passes * TOKENS, tmp_path)
    assert found.gb == 0
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found.refusal)


def test_without_a_home_directory_nothing_is_kept(free, monkeypatch):
    def nowhere():
        raise FileNotFoundError("there is no home directory to keep files in")

    monkeypatch.setattr(worth, "root_folder", nowhere)
    found = worth_of(tuned(deep()), ROWS, 5 * TOKENS)
    assert (found.gb, found.room) == (0, 0)
    assert found.refusal == "there is no home directory to keep files in"


def test_bytes_count_against_it(tmp_path, free, monkeypatch):
    monkeypatch.setattr(worth, "_PER_BYTE", {"cpu": 10**6})
    assert worth_of(tuned(deep()), ROWS, 5 * TOKENS, tmp_path).saved < 0


def test_what_is_kept_already_is_room(tmp_path, free):
    (tmp_path / "old").write_bytes(bytes(10**6))
    assert worth_of(tuned(deep()), ROWS, 5 * TOKENS, tmp_path).room == 10 * 10**9 + 10**5


def test_auto_of_a_prefix_that_changes_is_none(tmp_path, free):
    found = worth_of(tuned(deep(attention_dropout=0.1)), ROWS, 5 * TOKENS, tmp_path)
    assert found.gb == 0 and "dropout" in found.refusal


def test_auto_of_a_peer_is_none(free):
    peer = loreft.make(deep(), rank=1, positions="all", seed=0)
    assert settled_prefix(peer, Engine(prefix_cache_gb="auto"), ROWS, 5 * TOKENS).prefix_cache_gb == 0


def test_auto_asks_no_clock(tmp_path, free, monkeypatch):
    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, lambda *_: pytest.fail("a choice took the time of something"))
    handle = tuned(deep())
    assert worth_of(handle, ROWS, 99, tmp_path) == worth_of(handle, ROWS, 99, tmp_path)


# with a size that is given, the same is tried in test_prefix_cache.py in the ordinary run
@pytest.mark.slow
def test_fit_with_auto_is_that_without(cache, tmp_path, free):
    model = deep("gemma3")
    plain = fit(model, tmp_path / "plain", gb=0.0)
    result = fit(model, tmp_path / "auto", gb="auto")
    assert len(stores(cache / "prefix")) == 1
    assert losses(result) == pytest.approx(losses(plain), rel=1e-5)
    assert (vectors(result) - vectors(plain)).abs().max() <= 1e-4 * vectors(plain).abs().max()


def test_fit_with_auto(cache, tmp_path, free, capsys):
    model = deep("gemma3")
    fit(model, tmp_path / "auto", gb="auto", progress=True)
    assert len(stores(cache / "prefix")) == 1
    kept = json.loads((tmp_path / "auto" / "state.json").read_text())["engine"]
    assert (kept["select"]["prefix_cache_gb"], kept["tune"]["prefix_cache_gb"]) == (0.0, 10.0)
    assert "prefix cache of up to 10 GB" in capsys.readouterr().err
    found = dry_run(
        model, tiny_tokenizer(), Completions(EXAMPLES, HELD_OUT), RECIPE, engine=Engine(prefix_cache_gb="auto")
    )
    assert found.engine["tune"]["prefix_cache_gb"] == 10.0
    assert (found.prefix_cache["layers"], found.prefix_cache["passes"]) == (2, 3.0)
    assert found.prefix_cache["saved"] >= worth.LEAST_SAVED
    json.dumps(found.as_dict())


def test_a_run_goes_on_with_what_auto_was(cache, tmp_path, free, monkeypatch):
    model = deep()
    with stopped(monkeypatch):
        fit(model, tmp_path / "run", gb="auto", heads=[(2, 1)])
    # a rule would say no by now
    free.free = 0
    shutil.rmtree(cache / "prefix")
    monkeypatch.setattr(proven_store.shutil, "disk_usage", lambda p: SimpleNamespace(free=10**12))
    fit(model, tmp_path / "run", gb="auto", heads=[(2, 1)])
    assert len(stores(cache / "prefix")) == 1


def test_engine_of_auto():
    assert Engine(prefix_cache_gb="auto").prefix_cache_gb == "auto"
    assert "prefix" not in said(Engine())
    for wrong in ("much", True, None):
        with pytest.raises(TypeError, match="a number or 'auto'"):
            Engine(prefix_cache_gb=wrong)
    with pytest.raises(ValueError, match="got nan"):
        Engine(prefix_cache_gb=float("nan"))


def test_worth_counts_quantized_dtypes(tmp_path, free):
    # bytes of the states, which have the dtype that the model computes in
    assert worth_of(tuned(deep(dtype=torch.bfloat16)), ROWS, 5 * TOKENS, tmp_path).bytes == TOKENS * HIDDEN * 2
