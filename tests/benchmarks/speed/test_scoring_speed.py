"""The multiple-choice benchmark: its workload, its peer, and that it refuses to time what is not equal."""

import pytest
import torch

import benchmarks.speed.step.scoring_speed as scoring
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture
def model():
    return tiny_model("llama", max_position_embeddings=1024)


def test_measure_checks_then_times(model):
    found = scoring.scoring_speedup(model, tiny_tokenizer(), n_questions=2, rounds=1, checked=1)
    assert found["answers"] == 4 + 5
    assert found["prefix_tokens"] > 100
    assert {name: len(rounds) for name, rounds in found["seconds"].items()} == {"per_answer": 1, "packed": 1}
    assert found["speedup"]["low"] <= found["speedup"]["median"] <= found["speedup"]["high"]


def test_unequal_scores_are_not_timed(model, monkeypatch):
    right = scoring.score_choices
    monkeypatch.setattr(scoring, "score_choices", lambda *a, **o: [row + 0.5 for row in right(*a, **o)])
    monkeypatch.setattr(scoring, "interleaved", lambda *a, **o: pytest.fail("timed"))
    with pytest.raises(ValueError, match="off by 0.5"):
        scoring.scoring_speedup(model, tiny_tokenizer(), n_questions=1, rounds=1)


def test_the_work_has_choices_of_many_numbers_and_lengths():
    work = scoring.workload(8)
    assert {len(options) for options in work.choices} == {4, 5, 6, 7}
    assert len(set(work.questions)) == 8
    assert torch.tensor([len(text) for options in work.choices for text in options]).unique().numel() > 5
