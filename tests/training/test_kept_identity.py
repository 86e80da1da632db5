"""What makes two runs the same one: told apart where they differ, and known again in a folder of an earlier release."""

import json

import pytest

import lofit_fast as lf
from lofit_fast.data.encode import encode_all
from lofit_fast.evaluation.judge import judged_by
from lofit_fast.sealed import read_sealed, write_sealed
from lofit_fast.tasks.chat import Conversation, Rendered
from lofit_fast.tasks.task import Example
from lofit_fast.training.objectives import Preferences
from lofit_fast.training.run_digests import data_digest
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import count_steps, fit

QUICKEST = {"select": "random", "tune_epochs": 1}


@pytest.fixture
def kept(tmp_path):
    """Changes the identity that a run folder keeps, as an earlier release has written it."""

    def change(folder, **entries):
        state = read_sealed(folder / "state.json")
        write_sealed(folder / "state.json", {**state, "identity": {**state["identity"], **entries}})

    return change


def identity_of(folder):
    return read_sealed(folder / "state.json")["identity"]


@pytest.mark.parametrize("tops", [(1, 1.0), (1.0, 1)])
def test_one_head_and_all_heads_are_two_runs(llama, tmp_path, tops):
    one, other = (lf.Recipe(top=top, **QUICKEST) for top in tops)
    fit(llama, tmp_path / "run", one).handle.unpatch()
    with pytest.raises(ValueError, match=r"another recipe: .*what differs is recipe\.top"):
        fit(llama, tmp_path / "run", other)
    # nor do they share a step 1 that looks at how many are kept
    ends = [lf.Recipe(top=top, select="early_stop", select_epochs=1, tune_epochs=0) for top in tops]
    for number, end in enumerate(ends):
        fit(llama, tmp_path / str(number), end, step1_dir=tmp_path / "step1").handle.unpatch()
    assert len(list((tmp_path / "step1").glob("*/state.json"))) == 2


def test_a_whole_number_for_a_rate_is_the_same_run(llama, tmp_path, monkeypatch, kept):
    recipe = lf.Recipe(top=1, l1=0, max_grad_norm=2, **QUICKEST)
    assert (recipe.l1, recipe.max_grad_norm) == (0.0, 2.0) and type(recipe.l1) is type(recipe.max_grad_norm) is float
    fit(llama, tmp_path, recipe).handle.unpatch()
    now = identity_of(tmp_path)
    # as an earlier release kept it
    kept(tmp_path, recipe={**now["recipe"], "l1": 0, "max_grad_norm": 2})
    steps = []
    count_steps(monkeypatch, steps)
    fit(llama, tmp_path, recipe).handle.unpatch()
    assert steps == [] and repr(identity_of(tmp_path)) == repr(now)


def dpo(model, folder, pairs, **options):
    recipe = lf.Recipe(top=1, **QUICKEST)
    fitted = lf.fit_preferences(model, tiny_tokenizer(), pairs, recipe, output_dir=folder, progress=False, **options)
    fitted.handle.unpatch()


# the same answers, in the same order
ONE = [{"prompt": "Q: ", "chosen": "a", "rejected": ["b", "c", "d"]}]
TWO = [{"prompt": "Q: ", "chosen": "a", "rejected": ["b"]}, {"prompt": "Q: ", "chosen": "c", "rejected": ["d"]}]


def test_answers_of_other_questions_are_other_data(llama, tmp_path, kept):
    pytest.importorskip("trl")
    dpo(llama, tmp_path, ONE)
    with pytest.raises(ValueError, match="another data:"):
        dpo(llama, tmp_path, TWO)
    # as an earlier release kept it, which had one digest for both
    now = identity_of(tmp_path)
    encoded = Preferences(ONE).encoded(llama, tiny_tokenizer(), None)
    kept(tmp_path, data=data_digest(row for rows in encoded.answers for row in rows), beta=1)
    with pytest.raises(ValueError, match="another beta:"):
        dpo(llama, tmp_path, ONE)
    dpo(llama, tmp_path, ONE, beta=1)
    assert identity_of(tmp_path) == {**now, "beta": 1.0}


def test_a_finished_run_has_no_accuracy_for_other_accepted_answers(llama, tmp_path, kept):
    recipe = lf.Recipe(top=1, **QUICKEST)
    first, other = ([Example("Q: ", "a", accepted)] for accepted in (("a",), ("a", "b")))
    fit(llama, tmp_path, recipe, eval_data=first).handle.unpatch()
    now = identity_of(tmp_path)
    with pytest.raises(ValueError, match="another eval_data:"):
        fit(llama, tmp_path, recipe, eval_data=other)
    # as an earlier release kept it
    kept(tmp_path, eval_data=data_digest(encode_all(tiny_tokenizer(), first, 1000)))
    assert identity_of(tmp_path) != now
    fit(llama, tmp_path, recipe, eval_data=first).handle.unpatch()
    assert identity_of(tmp_path) == now


def test_all_that_the_exact_match_reads_is_told_apart():
    plain = Example("Q: ", "a", ("a", "b"))
    chat = {"prompt": Rendered("<u>Q"), "completion": "a", "text": "<u>Qa<e>", "learned": ((4, 8),), "marker": "</t>"}
    examples = [
        plain,
        Example("Q:", " a", ("a", "b")),
        Example("Q: ", "a", ("a b",)),
        Example(Rendered("Q: "), "a", ("a", "b")),
        Conversation(**chat),
        Conversation(**chat | {"marker": ""}),
        Conversation(**chat | {"text": "<u>Qa<f>"}),
    ]
    assert len({json.dumps(judged_by(example)) for example in examples}) == len(examples)
    assert judged_by(plain) == judged_by(Example("Q: ", "a", ("a", "b")))
