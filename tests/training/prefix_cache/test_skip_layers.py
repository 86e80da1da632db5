"""Layers that are skipped, or stopped at, by the forwards of one thread and by no others."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.prefix_cache.below import STATES, Prefix
from tests.crossing_threads import crossed_by
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens

IDS, OTHERS = tokens(2, 9), tokens(2, 9, 2)


@pytest.fixture(scope="module")
def prefix():
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(2, 0)]))
    randomize(handle)
    return Prefix(handle)


def states_of(prefix, ids):
    with torch.no_grad():
        return prefix.run(ids.tolist())


def logits_of(prefix, ids, **states):
    with torch.no_grad():
        return prefix.model(input_ids=ids, use_cache=False, **states).logits


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("plain_first", [True, False])
def test_states_are_those_of_the_thread_that_brings_them(prefix, plain_first, stays):
    expected = logits_of(prefix, IDS), logits_of(prefix, OTHERS)
    states = {STATES: states_of(prefix, OTHERS)}
    calls = [lambda: logits_of(prefix, IDS), lambda: logits_of(prefix, OTHERS, **states)]
    order = 1 if plain_first else -1
    with prefix.skipped():
        got = crossed_by(prefix.decoder, *calls[::order], stays=stays)
    for one, wanted in zip(got[::order], expected, strict=True):
        torch.testing.assert_close(one, wanted)


def test_a_model_that_stops_at_a_layer_stops_for_its_own_thread(prefix):
    expected = states_of(prefix, OTHERS), logits_of(prefix, IDS)
    got = crossed_by(prefix.decoder, lambda: states_of(prefix, OTHERS), lambda: logits_of(prefix, IDS), stays=False)
    for one, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(one, wanted)
