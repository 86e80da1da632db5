"""What torch has been told to do by default changes no result: neither a seed's vectors nor a run nor a score."""

from contextlib import contextmanager

import pytest
import torch

import lofit_fast as lf
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import generate_answers
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, fit


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    # as on a machine with a GPU, where people set "cuda"
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
OTHERS = [name for name in DEFAULTS if name not in ("float64", "meta")]
RECIPE = lf.Recipe(top=2, select_epochs=1, tune_epochs=1)


def vectors(handle):
    return torch.cat([parameter.detach().flatten() for parameter in handle.parameters()])


def drawn(model, scope):
    with scope():
        handle = lf.patch(model, lf.LofitConfig(offset="all", scale=[(0, 1)]))
    return vectors(handle)


def asked(model, scope):
    tokenizer = tiny_tokenizer()
    with scope():
        answers = generate_answers(model, tokenizer, ["a=", "bc="], max_new_tokens=3)
        return answers, score_choices(model, tokenizer, ["a="], [["b", "c"]])[0].tolist()


@pytest.mark.parametrize("name", ["float64", "meta", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_vectors_and_scores_are_the_same(name):
    plain = lambda: default_dtype(torch.float32)  # noqa: E731
    assert drawn(tiny_model("llama"), DEFAULTS[name]).equal(drawn(tiny_model("llama"), plain))
    assert asked(tiny_model("llama"), DEFAULTS[name]) == asked(tiny_model("llama"), plain)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    result = fit(tiny_model("llama"), tmp_path_factory.mktemp("run"), RECIPE, EXAMPLES[:4])
    return result.heads, vectors(result.handle)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_run_is_the_same(tmp_path, expected, name):
    model = tiny_model("llama")
    with DEFAULTS[name]():
        result = fit(model, tmp_path, RECIPE, EXAMPLES[:4])
    assert result.heads == expected[0]
    assert vectors(result.handle).equal(expected[1])
    with DEFAULTS[name]():
        assert result.scores.dtype == torch.float32


def test_a_model_of_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(ValueError, match="inference_mode"):
        fit(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
