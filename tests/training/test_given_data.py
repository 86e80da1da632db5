"""`fit` and `fit_preferences` on what people hold data in: the same run from each, or a refusal first."""

import pytest

import lofit_fast as lf
from lofit_fast.data import encode
from lofit_fast.data.given_examples import given_examples
from lofit_fast.training.objectives import Completions, Preferences
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import (
    EXAMPLES,
    HELD_OUT,
    QUICK,
    assert_equal_vectors,
    assert_same_state,
    fit,
    state_of,
    vectors,
)

PAIRS = [{"prompt": f"{a}?", "chosen": f" {a}", "rejected": [f" {a}{a}", " no"]} for a in "abcd"]


def holders():
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    return {
        "list": list,
        "dataset": datasets.Dataset.from_list,
        "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "frame": pandas.DataFrame,
        "generator": iter,
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("form", ["arrow", "pandas", "numpy", "torch"])
def test_a_data_set_of_another_format_is_the_same_rows(form, streamed):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(PAIRS)
    data = (data.to_iterable_dataset() if streamed else data).with_format(form)
    assert repr(list(given_examples(data))) == repr(PAIRS)


def test_a_data_sets_columns_and_transform_stay():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(PAIRS)
    chosen = data.with_format("arrow", columns=["prompt", "chosen"])
    assert list(given_examples(chosen)) == [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS]
    shouted = data.with_transform(lambda batch: {"prompt": [text.upper() for text in batch["prompt"]]})
    assert list(given_examples(shouted)) == [{"prompt": row["prompt"].upper()} for row in PAIRS]


def test_fit_takes_data_sets_and_frames(tmp_path):
    results = {}
    for name in ("list", "dataset", "frame"):
        hold, model = holders()[name], tiny_model("llama")
        result = fit(model, tmp_path / name, examples=hold(EXAMPLES), eval_data=hold(HELD_OUT))
        results[name] = vectors(result.handle)
        assert "exact_match" in result.metrics["tune"]
        assert_equal_vectors(results[name], results["list"])


@pytest.mark.parametrize("name", ["list", "dataset", "stream", "frame", "generator"])
def test_every_holder_is_the_same_data(name):
    hold, model, tokenizer = holders()[name], tiny_model("llama"), tiny_tokenizer()
    encoded = Completions(hold(EXAMPLES), hold(HELD_OUT)).encoded(model, tokenizer, None)
    assert encoded.identity() == Completions(EXAMPLES, HELD_OUT).encoded(model, tokenizer, None).identity()
    pytest.importorskip("trl")
    assert (
        Preferences(hold(PAIRS)).encoded(model, tokenizer, None).identity()
        == Preferences(PAIRS).encoded(model, tokenizer, None).identity()
    )


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ("my.jsonl", TypeError, "got 'my.jsonl', expected examples: read it with load_task"),
        ({"train": EXAMPLES}, TypeError, r"got a dict with the keys \['train'\]"),
        ([], ValueError, "the training data is empty"),
        (iter([]), ValueError, "the training data is empty"),
        ([{"text": "a"}], ValueError, r"expected examples with the keys prompt and completion.*, got \['text'\]"),
    ],
)
def test_fit_refuses_before_anything_changes(tmp_path, train, error, message):
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(error, match=message):
        fit(model, tmp_path / "run", examples=train)
    assert_same_state(model, before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "training data is empty"),
        ([PAIRS[0], {"prompt": "p"}], r"preference 2: got the keys \['prompt'\], expected"),
    ],
)
def test_fit_preferences_refuses_before_anything_changes(tmp_path, pairs, message):
    pytest.importorskip("trl")
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        lf.fit_preferences(model, tiny_tokenizer(), pairs, QUICK, output_dir=tmp_path / "run", progress=False)
    assert_same_state(model, before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", [Completions(EXAMPLES, HELD_OUT), Preferences(PAIRS)], ids=["texts", "pairs"])
def test_tokenizing_shows_a_bar(monkeypatch, objective):
    pytest.importorskip("trl")
    shown, bar = [], encode.tqdm
    monkeypatch.setattr(encode, "tqdm", lambda rows, **how: shown.append(how["disable"]) or bar(rows, **how))
    for progress in (True, False):
        objective.encoded(tiny_model("llama"), tiny_tokenizer(), None, progress)
    assert shown == [False] * (len(shown) // 2) + [True] * (len(shown) // 2) and shown
