"""The two small benchmarks of a step's memory and of a run's start: what they measure, on tiny models."""

import json

import pytest

from benchmarks.speed.step import long_answers, startup
from lofit_fast.models import head_trial, linear_loss


@pytest.fixture
def small(monkeypatch):
    """A small vocabulary, of which 16 tokens' logits are long and 4 a chunk."""
    monkeypatch.setattr(long_answers, "VOCABULARY", 512)
    for module in (linear_loss, head_trial):
        monkeypatch.setattr(module, "LONG", 16 * 512 * 4)
    monkeypatch.setattr(linear_loss, "CHUNK", 4 * 512 * 4)


def test_long_answers_are_the_same_both_ways(small):
    plain, chunked = (long_answers.measured(24, way) for way in (False, True))
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert chunked["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-5)
    assert set(plain) == {"peak_bytes", "loss", "gradient_norm"}


def test_long_answers_print_a_row_per_length(monkeypatch, capsys):
    monkeypatch.setattr(long_answers, "in_process", lambda length, chunked: {"peak_bytes": length + chunked})
    monkeypatch.setattr("sys.argv", ["long_answers", "--plain", "1024"])
    long_answers.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["labelled"] for row in rows] == list(long_answers.LENGTHS)
    assert rows[0]["all"] == {"peak_bytes": 1024} and "all" not in rows[2]
    assert rows[2]["logits_bytes"] == 8192 * 262_144 * 4


def test_a_phase_is_without_those_inside_it(monkeypatch):
    ticks = iter([(t, 10.0 * t) for t in (0.0, 1.0, 3.0, 6.0, 10.0)])
    monkeypatch.setattr(startup, "_now", lambda: next(ticks))
    clocks = startup.Clocks()
    with clocks.phase("outer"):
        clocks.wrapped("inner", lambda: None)()
    # a second before, two and four around, three inside
    assert clocks.seconds == {"rest": [1.0, 10.0], "outer": [6.0, 60.0], "inner": [3.0, 30.0]}


@pytest.mark.parametrize(("share", "code"), [(0.81, None), (0.79, 1)])
def test_startup_says_whether_the_share_is_reached(monkeypatch, capsys, share, code):
    run = {"steps": 40, "compiled": {}, "seconds": {"steps": [8.0, 9.0]}, "share": [share, 0.5]}
    monkeypatch.setattr(startup, "in_process", lambda *_: run)
    monkeypatch.setattr("sys.argv", ["startup"])
    if code is None:
        startup.main()
        assert capsys.readouterr().out.count("in steps: 81.0%") == 2
    else:
        with pytest.raises(SystemExit) as stopped:
            startup.main()
        assert stopped.value.code == code


def test_every_phase_is_there():
    from importlib import import_module

    for places in startup.PHASES.values():
        for module, path in places:
            found = import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
            assert callable(found)
