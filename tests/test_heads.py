"""The best heads by their scores."""

import json
import math
import time
from random import Random

import numpy as np
import pytest
import torch

from lofit_fast import LofitConfig, select_heads
from lofit_fast.heads import jaccard, read_heads, scores_as_json, scores_from_json
from lofit_fast.sealed import write_sealed
from tests.mutations import BYTES, JSON
from tests.planted_pickle import Planted

SCORES = torch.tensor([[0.1, 0.9, 0.3], [0.9, 0.2, 0.8]])
BEST_FIRST = [(0, 1), (1, 0), (1, 2), (0, 2), (1, 1), (0, 0)]


@pytest.mark.parametrize("count", range(1, 7))
def test_select_heads_best_first_ties_to_the_lower(count):
    assert select_heads(SCORES, count) == BEST_FIRST[:count]


@pytest.mark.parametrize("top, count", [(0.01, 1), (0.17, 1), (0.5, 3), (0.75, 4), (1.0, 6)])
def test_select_heads_takes_a_fraction(top, count):
    assert select_heads(SCORES, top) == BEST_FIRST[:count]


def test_select_heads_breaks_many_ties_in_order():
    # small sorts happen to be stable anyway
    scores = torch.arange(4096).remainder(3).float().view(64, 64)
    heads = select_heads(scores, 2000)
    assert heads == sorted(heads, key=lambda head: (-scores[head].item(), head))


def test_select_heads_makes_a_config():
    heads = select_heads(SCORES, 2)
    assert all(type(x) is int for pair in heads for x in pair)
    assert LofitConfig(offset=heads).offset == tuple(heads)


def test_select_heads_fraction_is_of_the_heads_in_the_running():
    scores = SCORES.clone()
    scores[1] = -math.inf
    assert select_heads(scores, 0.67) == [(0, 1), (0, 2)]


def test_select_heads_from_a_layer_up():
    assert select_heads(SCORES, 2, min_layer=0) == BEST_FIRST[:2]
    assert select_heads(SCORES, 2, min_layer=1) == [(1, 0), (1, 2)]
    # a fraction of the heads in the running, as ever
    assert select_heads(SCORES, 0.34, min_layer=1) == [(1, 0)]
    assert SCORES.isfinite().all()


def test_scores_as_json_and_back():
    scores = torch.tensor([[0.5, 1 / 3], [-math.inf, -math.inf], [2.0, -math.inf]])
    table = scores_as_json(scores)
    assert table == [[0.5, scores[0, 1].item()], [None, None], [2.0, None]]
    assert scores_from_json(json.loads(json.dumps(table, allow_nan=False))).equal(scores)
    # as earlier releases wrote it
    assert scores_from_json(json.loads(json.dumps(scores.tolist()))).equal(scores)


@pytest.mark.parametrize("top, min_layer, count", [(4, 1, 3), (0.5, 2, 0)])
def test_select_heads_refuses_more_than_the_upper_layers_have(top, min_layer, count):
    with pytest.raises(ValueError, match=f"only {count} have a score"):
        select_heads(SCORES, top, min_layer)


@pytest.mark.parametrize(
    "scores, top, message",
    [
        (SCORES, 7, "top 7 heads, but only 6"),
        (SCORES, 0, "at least 1 head"),
        (SCORES, 1.5, "fraction"),
        (SCORES, True, "top"),
        (SCORES[0], 1, r"\(layers, heads\), got \(3,\)"),
        (torch.tensor([[math.nan, 1.0]]), 1, "not finite"),
        (torch.tensor([[math.inf, 1.0]]), 1, "not finite"),
        (torch.full((2, 2), -math.inf), 0.5, "only 0 have a score"),
    ],
)
def test_select_heads_refuses(scores, top, message):
    with pytest.raises(ValueError, match=message):
        select_heads(scores, top)


@pytest.mark.parametrize(
    "first, second, expected",
    [([], [], 1.0), ([(0, 1)], [], 0.0), ([(0, 1), (1, 1)], [(1, 1), (0, 1)], 1.0), ([(0, 1)], [(0, 1), (2, 2)], 0.5)],
)
def test_jaccard(first, second, expected):
    assert jaccard(first, second) == expected


HEADS = [(3, 1), (0, 2), (1, 1)]


@pytest.fixture
def heads_file(tmp_path):
    write_sealed(tmp_path / "heads.json", {"heads": HEADS, "scores": None, "select": "lofit"})
    return tmp_path / "heads.json"


def test_heads_are_read_back_in_their_order(heads_file, tmp_path):
    assert read_heads(heads_file) == HEADS
    # what earlier releases wrote, and what a user writes
    for content in ({"heads": HEADS}, HEADS):
        (tmp_path / "other.json").write_text(json.dumps(content))
        assert read_heads(str(tmp_path / "other.json")) == HEADS


@pytest.mark.parametrize("kind", [*BYTES, *JSON])
def test_a_damaged_file_of_heads_is_an_error_or_the_same_heads(kind, heads_file):
    raw = heads_file.read_bytes()
    for seed in range(2 if kind in ("deep", "40,000 heads") else 25):
        heads_file.write_bytes({**BYTES, **JSON}[kind](raw, Random(f"{kind} {seed}")))
        try:
            assert read_heads(heads_file) == HEADS
        except ValueError as error:
            assert str(heads_file) in str(error) and len(str(error)) < 1000


WRONG = {
    "floats": [[0, 1.0]],
    "text": ["01", "02"],
    "true": [[0, True]],
    "negative": [[0, -1]],
    "three": [[0, 1, 2]],
    "huge": [[0, 10**40]],
    "none": [],
    "null": None,
    "keys": {"0": 1},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_list_of_heads_says_what_was_got(case, tmp_path):
    path = tmp_path / "heads.json"
    for content in ({"heads": WRONG[case]}, WRONG[case]):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{path} holds no heads: expected .* of non-negative integers, got "):
            read_heads(path)


def test_heads_that_are_listed_twice(tmp_path):
    (tmp_path / "heads.json").write_text("[[0, 1], [1, 1], [0, 1]]")
    with pytest.raises(ValueError, match=r"lists heads more than once: \[\(0, 1\)\]"):
        read_heads(tmp_path / "heads.json")


def test_heads_that_were_changed_by_hand_say_how_to_keep_them(heads_file):
    content = json.loads(heads_file.read_text())
    content["heads"][0] = [2, 2]
    heads_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='If you have changed it on purpose, take the line with "sha256" out'):
        read_heads(heads_file)
    del content["sha256"]
    heads_file.write_text(json.dumps(content))
    assert read_heads(heads_file) == [(2, 2), *HEADS[1:]]


@pytest.mark.parametrize("layers", [1, 40_000])
def test_40_000_heads_take_no_time(layers, tmp_path):
    heads = [(n % layers, n) for n in range(40_000)]
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    started = time.thread_time()
    assert LofitConfig(offset=read_heads(tmp_path / "heads.json")).offset == tuple(heads)
    # it was minutes
    assert time.thread_time() - started < 5


def test_heads_of_the_papers_code(tmp_path):
    # as its trainer saves them: an array of (layer, head), best first
    path = tmp_path / "llama2_7B_truthfulqa_Aonly_top2heads_42.npy"
    np.save(path, np.array([(np.int64(3), np.int64(1)), (0, 2)]))
    assert read_heads(path) == [(3, 1), (0, 2)]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), int),
        np.zeros(2, int),
        np.zeros((2, 2)),
        np.array([[0, -1]]),
        np.array([[0, 1], [0, 1]]),
        np.zeros((0, 2), int),
    ],
)
def test_arrays_that_are_no_heads(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy (holds no heads|lists heads more than once)"):
        read_heads(tmp_path / "a.npy")


def test_a_pickle_in_an_array_is_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Planted(tmp_path / "ran")], dtype=object), allow_pickle=True)
    for content in (None, b"", b"\x93NUMPY\x01\x00", b"\x80\x04."):
        if content is not None:
            (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npy holds no heads"):
            read_heads(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()
