"""LofitConfig and Recipe: what they take, what they refuse, and that they cannot change."""

from dataclasses import FrozenInstanceError

import pytest

from lofit_fast.config import RECIPES, LofitConfig, Recipe, check_top

PAIRS = ((0, 1), (2, 3))

ACCEPTED = [
    ("all", "all"),
    (None, None),
    (PAIRS, PAIRS),
    (list(PAIRS), PAIRS),
    ([[0, 1], [2, 3]], PAIRS),
    (PAIRS[::-1], PAIRS[::-1]),
]

REFUSED = [
    ([], ValueError, "empty list of heads"),
    ([(0, 1), (0, 1)], ValueError, r"more than once: \[\(0, 1\)\]"),
    ("every", TypeError, "'all', None or a list.*got 'every'"),
    (3, TypeError, "'all', None or a list.*got 3"),
    ([3], TypeError, r"\(layer, head\) pairs .*got 3"),
    ([(0, 1, 2)], TypeError, r"pairs .*got \(0, 1, 2\)"),
    ([(0, -1)], TypeError, r"non-negative integers, got \(0, -1\)"),
    ([(0, 1.0)], TypeError, r"integers, got \(0, 1\.0\)"),
    (["01"], TypeError, "pairs .*got '01'"),
    ([(0, "1")], TypeError, "pairs"),
]

BAD_RECIPES = [
    ({"select_lr": 0}, "select_lr > 0, got 0"),
    ({"tune_lr": -1e-3}, "tune_lr > 0"),
    ({"batch_size": 0}, "batch_size > 0"),
    ({"accumulation_steps": 0}, "accumulation_steps > 0"),
    ({"max_grad_norm": 0}, "max_grad_norm > 0"),
    ({"eval_batch_size": 0}, "eval_batch_size > 0"),
    ({"select_epochs": -1}, "select_epochs >= 0"),
    ({"tune_epochs": -1}, "tune_epochs >= 0"),
    ({"min_layer": -1}, "min_layer >= 0"),
    ({"l1": -1e-9}, "l1 >= 0"),
    ({"init_std": float("nan")}, "init_std >= 0"),
    ({"batch_size": 8, "accumulation_steps": 3}, "batch_size 8 does not divide into accumulation_steps 3"),
    ({"top": 0}, "at least 1 head"),
    ({"max_length": 0}, "max_length > 0, or None, got 0"),
    *(({name: float("inf")}, f"a finite {name}, got inf") for name in ("select_lr", "tune_lr", "l1", "init_std")),
]


@pytest.mark.parametrize("component", ["scale", "offset"])
@pytest.mark.parametrize("given, expected", ACCEPTED)
def test_config_takes(component, given, expected):
    other = "offset" if component == "scale" else "scale"
    config = LofitConfig(**{component: given, other: "all"})
    assert getattr(config, component) == expected
    assert getattr(config, other) == "all"


@pytest.mark.parametrize("component", ["scale", "offset"])
@pytest.mark.parametrize("given, error, message", REFUSED)
def test_config_refuses(component, given, error, message):
    with pytest.raises(error, match=rf"{component}.*{message}"):
        LofitConfig(**{component: given})


@pytest.mark.parametrize("name, value", [("seed", "x"), ("seed", 1.5), ("seed", True), ("init_std", "x")])
def test_config_refuses_other_types(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"{name}.* got {value!r}"):
        LofitConfig(offset="all", **{name: value})


def test_config_refuses_nothing_to_adapt():
    with pytest.raises(ValueError, match="nothing to adapt"):
        LofitConfig()


@pytest.mark.parametrize("std", [-1e-3, float("nan")])
def test_config_refuses_a_negative_spread(std):
    with pytest.raises(ValueError, match="init_std >= 0"):
        LofitConfig(scale="all", init_std=std)


def test_config_defaults_are_the_papers():
    config = LofitConfig(scale="all")
    assert (config.offset, config.init_std, config.seed) == (None, 1e-3, 42)


def test_config_is_a_frozen_value():
    config = LofitConfig(offset=[(0, 1)])
    assert config == LofitConfig(offset=((0, 1),))
    assert hash(config) == hash(LofitConfig(offset=((0, 1),)))
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize("changes, message", BAD_RECIPES)
def test_recipe_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize("task", RECIPES)
def test_recipe_of_each_task_is_valid(task):
    recipe = Recipe(**RECIPES[task])
    assert all(getattr(recipe, name) == value for name, value in RECIPES[task].items())


@pytest.mark.parametrize("top", [1, 48, 0.03, 1.0])
def test_check_top_takes(top):
    assert check_top(top) is None
    assert Recipe(top=top).top == top


@pytest.mark.parametrize("top", [0, -1, 0.0, 1.5, -0.1, float("nan"), True, "3", None])
def test_check_top_refuses(top):
    with pytest.raises(ValueError, match="top"):
        check_top(top)


@pytest.mark.parametrize("name", ["select_lr", "tune_lr", "l1", "max_grad_norm", "init_std", "max_length", "seed"])
@pytest.mark.parametrize("value", [None, "3", True, [1.0]])
def test_recipe_names_what_is_no_number(name, value):
    if name == "max_length" and value is None:
        return
    with pytest.raises(TypeError, match=rf"expected {name} to be .*got "):
        Recipe(**{name: value})


@pytest.mark.parametrize("pair", [(True, 0, 1), (0, True), (0, 1, 2), "01"])
def test_config_takes_no_pair_with_more_in_it(pair):
    with pytest.raises(TypeError, match="pairs of non-negative integers"):
        LofitConfig(offset=[pair])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_config_seed_is_one_that_generators_take(seed):
    with pytest.raises(ValueError, match="expected seed in "):
        LofitConfig(offset="all", seed=seed)


@pytest.mark.parametrize("init_std", [float("inf"), float("nan"), 10**400])
def test_config_init_std_is_finite(init_std):
    with pytest.raises(ValueError, match="expected a finite number init_std >= 0"):
        LofitConfig(offset="all", init_std=init_std)


def test_config_messages_are_no_longer_than_they_need_be():
    twice = [(0, n) for n in range(10_000)] * 2
    with pytest.raises(ValueError, match="lists heads more than once") as raised:
        LofitConfig(offset=twice)
    assert len(str(raised.value)) < 400
