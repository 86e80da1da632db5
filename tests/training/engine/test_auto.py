"""What "auto" becomes: the fastest attention, compiling where it pays back, asked of the machine once."""

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.rivals import RIVALS
from lofit_fast.cpu.attention import GROUPED
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import collator_of
from lofit_fast.training import CompletionCollator, Engine
from lofit_fast.training.engine import step_times
from lofit_fast.training.engine.auto import settle, settle_on
from tests.tiny_models import tokens

ROWS, ROWS_OF_40 = ([{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(2, n)] for n in (8, 40))


def batch(engine):
    return collator_of(engine, 0)(ROWS)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Pretended timings instead of real ones, which hold; the list of what was measured."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    table = {
        (GROUPED, False): {"first": 1.0, "step": 1.0, "tokens": 16},
        ("sdpa", False): {"first": 1.0, "step": 2.0, "tokens": 16},
        (GROUPED, True): {"first": 60.0, "step": 0.7, "tokens": 16},
    }
    seen = []

    def pretend(self, engines, repeats=3):
        asked = [(engine.attention, engine.compile) for engine in engines]
        seen.extend(asked if repeats == 3 else [])
        return [table[one] for one in asked]

    monkeypatch.setattr(step_times.Timings, "_measured", pretend)
    return seen


@pytest.fixture
def handle(llama):
    return lf.patch(llama, lf.LofitConfig(scale="all"))


@pytest.mark.parametrize(
    ("engine", "steps", "chosen", "looked_at"),
    [
        (Engine(), 39, ("sdpa", False), 0),
        (Engine(), 119, (GROUPED, False), 2),
        (Engine(), 199, (GROUPED, False), 3),
        (Engine(), 1000, (GROUPED, True), 3),
        (Engine(compile=False), 1000, (GROUPED, False), 2),
        (Engine(attention=GROUPED), 1000, (GROUPED, True), 2),
        (Engine(attention="sdpa", compile=True), 1000, ("sdpa", True), 0),
    ],
)
def test_probe_settles(handle, measured, engine, steps, chosen, looked_at):
    settled, why = settle(handle, engine, batch, steps)
    assert (settled.attention, settled.compile, settled.packing) == (*chosen, False)
    assert len(measured) == looked_at
    assert chosen[0] in why


@pytest.mark.parametrize(
    ("engine", "steps", "narrow", "large_pages"),
    [
        (Engine(compile=False), 10, True, False),
        (Engine(attention="sdpa", compile=True), 999, False, True),
        (Engine(attention="sdpa", compile=True), 1000, True, True),
        (Engine(attention="sdpa", compile=True, narrow=True, large_pages=False), 10, True, False),
        (Engine(compile=False, narrow=False, large_pages=True), 10, False, True),
    ],
)
def test_probe_settles_what_costs_once(handle, engine, steps, narrow, large_pages):
    settled, _ = settle(handle, engine, batch, steps)
    assert (settled.narrow, settled.large_pages) == (narrow, large_pages)


def test_probe_asks_the_machine_once(handle, measured):
    first = settle(handle, Engine(), batch, 1000)
    assert settle(handle, Engine(), batch, 1000) == first
    assert len(measured) == 3
    # another length bucket is another question
    settle(handle, Engine(), lambda _: CompletionCollator(0)(ROWS_OF_40), 1000)
    assert len(measured) == 6


def test_probe_uses_what_it_knows_of_compiling(handle, measured):
    settle(handle, Engine(), batch, 1000)
    # too short to have tried it; the sixty seconds it takes are saved after two hundred steps
    assert not settle(handle, Engine(), batch, 119)[0].compile
    assert settle(handle, Engine(), batch, 201)[0].compile
    assert len(measured) == 3


def test_probe_measures_and_leaves_no_trace(handle, monkeypatch, tmp_path):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    before, state = handle.model.config._attn_implementation, torch.get_rng_state()
    [timing] = step_times.Timings(handle, batch).of([Engine(attention="eager", compile=False)])
    assert 0 < timing["step"] < 60
    assert handle.model.config._attn_implementation == before
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in handle.parameters())


def examples(*lengths, shared=0):
    beginning = tokens(1, shared + 1, 99)[0].tolist()[:shared]
    rows = [beginning + tokens(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    return [{"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]} for ids in rows]


@pytest.mark.parametrize(
    ("attention", "packing", "rows", "expected"),
    [
        (GROUPED, "auto", examples(60, 60, 60, 60, shared=20), True),
        (GROUPED, "auto", examples(64, 64, 64, 64), False),
        (GROUPED, "auto", examples(80, 60, 40), True),
        (GROUPED, True, examples(60, 60, 60, 60), True),
        (GROUPED, False, examples(80, 60, 40), False),
        ("sdpa", "auto", examples(80, 60, 40), False),
        ("sdpa", True, examples(80, 60, 40), True),
        ("flash_attention_2", "auto", examples(60, 60), True),
    ],
)
def test_probe_packs_where_it_saves(handle, attention, packing, rows, expected):
    engine = Engine(attention=attention, compile=False, packing=packing)
    settled, why = settle_on(handle, engine, rows, 0, len(rows), 1)
    assert settled.packing is expected
    assert ("packed" in why) is expected


def test_probe_does_not_pack_what_it_does_not_know(handle):
    handle.model.config.use_bidirectional_attention = True
    engine = Engine(attention=GROUPED, compile=False)
    assert settle_on(handle, engine, examples(80, 60, 40), 0, 3, 1)[0].packing is False


def test_probe_refuses_packing_that_would_be_wrong(handle):
    handle.model.config.use_bidirectional_attention = True
    engine = Engine(attention=GROUPED, compile=False, packing=True)
    with pytest.raises(ValueError, match="packing with 'lofit_grouped' attention was asked for, but "):
        settle_on(handle, engine, examples(80, 60, 40), 0, 3, 1)


def test_probe_does_not_pack_for_who_must_know_examples_apart(llama):
    loreft = RIVALS["loreft"].make(llama)
    engine = Engine(attention=GROUPED, compile=False)
    assert settle_on(loreft, engine, examples(80, 60, 40), 0, 3, 1)[0].packing is False


def test_probe_asks_again_where_packing_saves_otherwise(handle, measured):
    # as long as each other, padded
    for shared, own in ((20, 80), (60, 40)):
        rows = examples(own, own, own, own, shared=shared)
        settle_on(handle, Engine(attention=GROUPED, compile="auto"), rows, 0, 4, 50)
    assert len(measured) == 2


def test_probe_measures_what_will_run(handle, monkeypatch, tmp_path):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    seen = []
    handle.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("packed_rows" in kwargs), with_kwargs=True
    )
    settled, _ = settle_on(handle, Engine(compile=False), examples(80, 60, 40), 0, 3, 1000)
    # both attentions, four steps each
    assert sorted(seen) == [False] * 4 + [True] * 4
    assert settled.packing is (settled.attention == GROUPED)
