"""Timings of a step: in turns, the least of several, remembered, and forgotten where the machine was busy then."""

import pytest

import lofit_fast as lf
from lofit_fast.cpu.attention import GROUPED
from lofit_fast.data.pack import collator_of
from lofit_fast.training import CompletionCollator, Engine
from lofit_fast.training.engine import step_times
from lofit_fast.training.engine.auto import settle
from lofit_fast.training.engine.step_times import Timings
from tests.tiny_models import tokens

ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(2, 8)]
ENGINES = [Engine(attention=name, compile=False, packing=False) for name in (GROUPED, "sdpa")]


def batch(engine):
    return collator_of(engine, 0)(ROWS)


def timing(first, step):
    return {"first": first, "step": step, "tokens": 16}


@pytest.fixture
def handle(llama, monkeypatch, tmp_path):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    return lf.patch(llama, lf.LofitConfig(scale="all"))


@pytest.fixture
def clock(monkeypatch):
    """Pretended seconds, as a list to fill: each step takes the next; the attentions of the steps."""
    seconds, order = [], []

    def step(model, batch, parameters):
        order.append(model.config._attn_implementation)
        taken = seconds.pop(0)
        if taken is None:
            raise RuntimeError("cannot run here")
        return taken

    monkeypatch.setattr(step_times, "_seconds_of_step", step)
    return seconds, order


def test_timings_are_taken_in_turns_and_the_least_counts(handle, clock):
    seconds, order = clock
    seconds += [9.0, 8.0, 5.0, 6.0, 3.0, 4.0, 7.0, 4.5]
    assert Timings(handle, batch).of(ENGINES) == [timing(9.0, 3.0), timing(8.0, 4.0)]
    assert order == [GROUPED, "sdpa"] * 4


def test_timings_of_what_fails_are_infinite_and_it_is_not_tried_again(handle, clock):
    seconds, order = clock
    seconds += [None, 8.0, 6.0, 4.0, 4.5]
    failed, fine = Timings(handle, batch).of(ENGINES)
    assert failed == timing(float("inf"), float("inf"))
    assert fine == timing(8.0, 4.0)
    # remembered as well
    assert Timings(handle, batch).of(ENGINES) == [failed, fine]
    assert order.count(GROUPED) == 1


@pytest.mark.parametrize(("now", "forgotten"), [(0.7, True), (0.8, False), (1.0, False), (30.0, False)])
def test_timings_of_a_busier_time_are_forgotten(handle, clock, now, forgotten):
    seconds, _ = clock
    seconds += [1.0, 2.0] * 4
    known = Timings(handle, batch)
    known.of(ENGINES)
    # measured just now
    assert not known.refreshed(ENGINES[0])
    later = Timings(handle, batch)
    seconds += [5.0, now]
    assert later.refreshed(ENGINES[0]) is forgotten
    for again in (later, Timings(handle, batch)):
        assert [again.knows(engine) for engine in ENGINES] == [not forgotten] * 2
    assert not seconds


@pytest.mark.parametrize(
    ("then", "later", "now", "forgotten"),
    [(15, 9, 0.5, False), (15, 9, 0.4, True), (9, 15, 0.8, False), (9, 15, 0.7, True)],
)
def test_timings_of_another_length_are_compared_with_what_it_should_take(handle, clock, then, later, now, forgotten):
    def of_length(length):
        rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(2, length)]
        # one question: both are of the same power of two
        return lambda engine: CompletionCollator(0, pad_to_multiple_of=1)(rows)

    seconds, _ = clock
    seconds += [1.0] * 4
    Timings(handle, of_length(then)).of(ENGINES[:1])
    seconds += [1.0, now]
    assert Timings(handle, of_length(later)).refreshed(ENGINES[0]) is forgotten
    assert not seconds


def test_a_choice_made_in_a_busier_time_is_made_anew(handle, clock):
    seconds, _ = clock
    # grouped attention had the machine to share
    seconds += [4.0, 3.0] * 4
    assert settle(handle, Engine(compile=False), batch, 40)[0].attention == "sdpa"
    seconds += [1.2, 1.2, *[1.0, 1.1] * 4]
    assert settle(handle, Engine(compile=False), batch, 40)[0].attention == GROUPED
    seconds += [1.0, 1.0]
    assert settle(handle, Engine(compile=False), batch, 40)[0].attention == GROUPED
    assert not seconds
