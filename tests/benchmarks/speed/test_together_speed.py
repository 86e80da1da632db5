"""The measurement of runs that are trained together, on a tiny model."""

import pytest

from benchmarks.speed.step.together_speed import measured
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.mark.slow
def test_runs_together_are_measured_beside_runs_one_by_one():
    found = measured((tiny_model("llama"), tiny_tokenizer()), runs=2, rounds=1)
    assert found["losses_apart"] < 1e-4 and found["steps"] == [3, 3]
    assert set(found["cpu_seconds"]) == {"one by one", "together"} and found["profile"]
