"""The generation benchmark: every row is timed, and none when ours answers something else than the hook."""

import pytest
import torch

import benchmarks.generation as generation
from benchmarks.generation import ROWS, measure
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

PROMPTS = ["abc", "a longer prompt", "z"]


def test_every_row_is_timed_in_every_round():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(model, tiny_tokenizer(), PROMPTS, rounds=2)
    assert [(row["provider"], len(row["seconds"])) for row in found["rows"]] == [(row.provider, 2) for row in ROWS]
    assert found["other_first_tokens"] == 0.0 and found["prompts"] == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_answers_are_not_timed(monkeypatch):
    run = generation._run

    def other(one, batch):
        right = run(one, batch)
        return right if one.row.provider == "hook" else lambda: (right() + 1) % 7

    monkeypatch.setattr(generation, "_run", other)
    monkeypatch.setattr(generation, "interleaved", lambda *a, **o: pytest.fail("timed"))
    with pytest.raises(ValueError, match="another token than the hook's"):
        measure(tiny_model("llama"), tiny_tokenizer(), PROMPTS, rounds=1)


def test_prompts_are_padded_on_the_left():
    batch = generation._left_padded(tiny_tokenizer(), PROMPTS, torch.device("cpu"))
    mask = batch["attention_mask"]
    assert mask.shape == batch["input_ids"].shape
    assert mask[:, -1].all() and (mask.diff(dim=1) >= 0).all()
