"""Eval mode for a while, by scopes that are nested, overlap, and come from several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

from lofit_fast.patching.modes import _FOUND, eval_mode


@pytest.fixture
def model():
    """In training mode but for one part, as a frozen one is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.train()
    model[1][1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def leave(scope):
    scope.__exit__(None, None, None)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_last_to_leave_puts_back_what_the_first_has_found(model, order):
    before, pair = modes(model), (eval_mode(model), eval_mode(model))
    for scope in pair:
        scope.__enter__()
    assert not any(modes(model))
    leave(pair[order[0]])
    assert not any(modes(model))
    leave(pair[order[1]])
    assert modes(model) == before and not _FOUND


def test_a_part_of_a_model_is_put_back_with_the_rest(model):
    before = modes(model)
    part, whole = eval_mode(model[1]), eval_mode(model)
    part.__enter__()
    whole.__enter__()
    leave(part)
    assert not any(modes(model))
    leave(whole)
    assert modes(model) == before


def test_a_scope_inside_another_leaves_the_modes_that_it_found(model):
    before = modes(model)
    with eval_mode(model):
        with eval_mode(model):
            model.train()
        assert not any(modes(model))
    assert modes(model) == before


def test_many_threads_leave_the_modes_that_were(model):
    before = modes(model)

    def often(_):
        for _ in range(50):
            with eval_mode(model):
                assert not any(modes(model))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(often, range(8)))
    assert modes(model) == before and not _FOUND


def test_an_exception_puts_modes_back(model):
    before = modes(model)
    with pytest.raises(RuntimeError, match="inside"), eval_mode(model):
        raise RuntimeError("inside")
    assert modes(model) == before
