"""A question about a model is tried once in a scope, and each time outside of one."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.trials import as_the_base, labelled_logits, remembering, trial_examples, tried_once
from tests.library_versions import BY_ROW
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, QUICK


def test_a_question_is_asked_once_in_a_scope():
    asked, (one, other) = [], (tiny_model("llama"), tiny_model("llama"))

    def ask():
        asked.append(1)
        return len(asked)

    assert [tried_once(one, "q", ask) for _ in range(2)] == [1, 2]
    with remembering():
        assert [tried_once(one, "q", ask) for _ in range(2)] == [3, 3]
        with remembering():
            assert (tried_once(one, "q", ask), tried_once(other, "q", ask), tried_once(one, "r", ask)) == (3, 4, 5)
        assert tried_once(one, "r", ask) == 5
    assert tried_once(one, "q", ask) == 6


def test_as_the_base_is_for_models_with_vectors_and_without():
    model, batch = tiny_model("llama"), {"input_ids": tokens()}
    with torch.no_grad():
        expected = model(**batch).logits
        with as_the_base(model):
            assert model(**batch).logits.equal(expected)
        randomize(lf.patch(model, lf.LofitConfig(offset="all")))
        assert not model(**batch).logits.equal(expected)
        with as_the_base(model):
            assert model(**batch).logits.equal(expected)


@pytest.mark.parametrize("logits", ["all", "rows"])
@torch.no_grad()
def test_labelled_logits_are_of_labelled_tokens(logits):
    if logits == "rows" and BY_ROW != "rows":
        pytest.skip("this transformers takes no mask as logits_to_keep")
    model = tiny_model("llama")
    rows = trial_examples(model)
    found, loss = labelled_logits(model, CompletionCollator(0, logits=logits)(rows))
    wanted = []
    for row in rows:
        alone = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        wanted += [alone[at] for at, label in enumerate(row["labels"][1:]) if label != IGNORED]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    labels = torch.tensor([label for row in rows for label in row["labels"] if label != IGNORED])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(found, labels))


def test_no_answer_is_an_answer_and_an_error_is_none():
    asked = []

    def nothing():
        asked.append(1)

    def failing():
        raise ValueError("no")

    with remembering():
        assert tried_once(None, "q", nothing) is tried_once(None, "q", nothing) is None
        assert len(asked) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                tried_once(None, "r", failing)
        assert tried_once(None, "r", lambda: 1) == 1


def test_a_run_tries_its_model_once(tmp_path):
    model, passes = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    lf.fit(model, tiny_tokenizer(), EXAMPLES, QUICK, output_dir=tmp_path, progress=False).handle.unpatch()
    # next tokens with padding and without, attention twice, all logits and those of an index, narrowing twice. both
    # steps used to try
    assert passes.count(False) == 8
