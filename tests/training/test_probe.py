"""What "auto" becomes: the fastest attention, compiling where it pays back, asked of the machine once."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.attention import GROUPED
from lofit_fast.training import CompletionCollator, Engine, probe
from lofit_fast.training.probe import settle
from tests.tiny import tokens

ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(2, 7)]
BATCH = CompletionCollator(0)(ROWS)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Pretended timings instead of real ones; the list of what was measured."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    table = {
        (GROUPED, False): {"first": 1.0, "step": 1.0},
        ("sdpa", False): {"first": 1.0, "step": 2.0},
        (GROUPED, True): {"first": 60.0, "step": 0.7},
    }
    seen = []

    def pretend(self, engine):
        seen.append((engine.attention, engine.compile))
        return table[seen[-1]]

    monkeypatch.setattr(probe._Timings, "_measured", pretend)
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
    settled, why = settle(handle, engine, lambda: BATCH, steps)
    assert (settled.attention, settled.compile, settled.packing) == (*chosen, False)
    assert len(measured) == looked_at
    assert chosen[0] in why


def test_probe_asks_the_machine_once(handle, measured):
    first = settle(handle, Engine(), lambda: BATCH, 1000)
    assert settle(handle, Engine(), lambda: BATCH, 1000) == first
    assert len(measured) == 3
    # another length bucket is another question
    settle(handle, Engine(), lambda: {**BATCH, "input_ids": torch.zeros(2, 40, dtype=torch.int64)}, 1000)
    assert len(measured) == 6


def test_probe_uses_what_it_knows_of_compiling(handle, measured):
    settle(handle, Engine(), lambda: BATCH, 1000)
    # too short to have tried it; the sixty seconds it takes are saved after two hundred steps
    assert not settle(handle, Engine(), lambda: BATCH, 119)[0].compile
    assert settle(handle, Engine(), lambda: BATCH, 201)[0].compile
    assert len(measured) == 3


def test_probe_measures_and_leaves_no_trace(handle, monkeypatch, tmp_path):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    before, state = handle.model.config._attn_implementation, torch.get_rng_state()
    timing = probe._Timings(handle, BATCH).of("eager", False)
    assert 0 < timing["step"] < 60
    assert handle.model.config._attn_implementation == before
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in handle.parameters())


def test_probe_packs_with_flash_attention_only(handle):
    def packed(**options):
        return settle(handle, Engine(compile=False, **options), lambda: BATCH, 1)[0].packing

    assert packed(attention="flash_attention_2")
    assert not packed(attention="sdpa")
    assert packed(attention="sdpa", packing=True)
