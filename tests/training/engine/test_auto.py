"""What "auto" becomes: rules on the device, the model and the work, the same in every process and without a clock."""

import time

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers import loreft
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import GROUPED
from lofit_fast.training import Engine
from lofit_fast.training.engine import auto
from lofit_fast.training.engine.auto import pays_to_compile, settle
from tests.tiny_models import tokens

ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(2, 8)]


@pytest.fixture
def handle(llama):
    return lf.patch(llama, lf.LofitConfig(scale="all"))


@pytest.mark.parametrize(
    ("engine", "attention", "compiled"),
    [
        (Engine(), GROUPED, False),
        (Engine(attention="sdpa"), "sdpa", False),
        (Engine(compile=True), GROUPED, True),
        (Engine(attention="eager", compile=True), "eager", True),
    ],
)
def test_auto_settles(handle, engine, attention, compiled):
    settled, said = settle(handle, engine, ROWS, 0, 2, 3)
    assert "auto" not in vars(settled).values()
    assert (settled.attention, settled.compile) == (attention, compiled)
    assert attention in said and ("not compiled" in said) is not compiled
    # the model keeps what it has until it is prepared
    assert handle.model.config._attn_implementation == "sdpa"


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
def test_auto_settles_what_costs_once(handle, engine, steps, narrow, large_pages):
    settled, _ = settle(handle, engine, ROWS, 0, 2, steps)
    assert (settled.narrow, settled.large_pages) == (narrow, large_pages)


def test_auto_asks_no_clock(handle, monkeypatch):
    def asked(*_):
        raise AssertionError("a choice took the time of something")

    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, asked)
    assert settle(handle, Engine(), ROWS, 0, 2, 1000) == settle(handle, Engine(), ROWS, 0, 2, 1000)


def test_auto_compiles_from_so_much_work_on(llama, monkeypatch):
    weights = sum(parameter.numel() for parameter in llama.model.layers.parameters())
    enough = int(-(-auto.COMPILE_FROM // (4 * weights)))
    cpu = torch.device("cpu")
    monkeypatch.setattr(auto.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None)
    assert pays_to_compile(llama, cpu, enough)
    assert not pays_to_compile(llama, cpu, enough - 1)
    # no GPU has said that it pays there
    assert not pays_to_compile(llama, torch.device("cuda"), enough)
    monkeypatch.setattr(auto.shutil, "which", lambda name: None)
    assert not pays_to_compile(llama, cpu, enough)


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
def test_auto_packs_where_it_saves(handle, attention, packing, rows, expected):
    engine = Engine(attention=attention, compile=False, packing=packing)
    settled, said = settle(handle, engine, rows, 0, len(rows), 1)
    assert settled.packing is expected
    assert ("packed" in said) is expected


def test_auto_does_not_pack_what_it_does_not_know(handle):
    handle.model.config.use_bidirectional_attention = True
    engine = Engine(attention=GROUPED, compile=False)
    assert settle(handle, engine, examples(80, 60, 40), 0, 3, 1)[0].packing is False


def test_auto_refuses_packing_that_would_be_wrong(handle):
    handle.model.config.use_bidirectional_attention = True
    engine = Engine(attention=GROUPED, compile=False, packing=True)
    with pytest.raises(ValueError, match="packing with 'lofit_grouped' attention was asked for, but "):
        settle(handle, engine, examples(80, 60, 40), 0, 3, 1)


def test_auto_does_not_pack_for_who_must_know_examples_apart(llama):
    peer = loreft.make(llama)
    engine = Engine(attention=GROUPED, compile=False)
    assert settle(peer, engine, examples(80, 60, 40), 0, 3, 1)[0].packing is False
