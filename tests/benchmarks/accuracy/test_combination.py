"""LoFiT and LoRA together, on a tiny model: every row trains, is judged, and leaves the model as it was."""

import json

import pytest

import lofit_fast as lf
from benchmarks.accuracy.combination import ROWS, compare
from lofit_fast.tasks.kinship import kinship
from tests.patched_models import snapshot
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer

RECIPE = lf.Recipe(top=3, select_epochs=1, tune_epochs=2, batch_size=14)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_row_is_judged_and_comes_off(tmp_path):
    model = tiny_model("llama", max_position_embeddings=128)
    before = snapshot(model)
    result = compare(model, word_tokenizer(), kinship(14, 1, 0), RECIPE, n_seeds=1, folder=tmp_path)
    assert snapshot(model) == before
    assert json.loads((tmp_path / "combination.json").read_text()) == result
    assert result["exact_match"].keys() == {"base", *ROWS}
    assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in result["exact_match"].values())
