"""The generation benchmark: every row is timed, and none when ours answers something else than the hook."""

import pytest

import benchmarks.speed.step.generation_speed as generation
from benchmarks.speed.step.generation_speed import ROWS, generation_seconds
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

PROMPTS = ["abc", "a longer prompt", "z"]


def test_every_row_is_timed_in_every_round():
    pytest.importorskip("peft")
    found = generation_seconds(tiny_model("llama"), tiny_tokenizer(), PROMPTS, rounds=2)
    assert [(row["peer"], len(row["seconds"])) for row in found["rows"]] == [(row.peer, 2) for row in ROWS]
    assert found["against_ours"].keys() == {"hook", "lora_all"} and found["prompts"] == 3


@pytest.mark.parametrize(
    ("changed", "message"), [("ours", "another token than the hook's"), ("both", "begin as the base's do")]
)
def test_other_answers_are_not_timed(monkeypatch, changed, message):
    """As of an adapter that does nothing: one that ours has dropped, and vectors that nobody applies."""
    pytest.importorskip("peft")
    monkeypatch.setattr(generation, "interleaved", lambda *a, **o: pytest.fail("timed"))
    peer, run = ("ours",) if changed == "ours" else ("ours", "hook"), generation.prompt_run

    def idle(one, batch):
        if one.row.peer in peer:
            for parameter in one.attached.parameters:
                monkeypatch.setattr(parameter, "copy_", lambda rows: None)
        return run(one, batch)

    monkeypatch.setattr(generation, "prompt_run", idle)
    with pytest.raises(ValueError, match=message):
        generation_seconds(tiny_model("llama"), tiny_tokenizer(), PROMPTS, rounds=1)
