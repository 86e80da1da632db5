"""DPO's reference of a patched model against an untouched copy of its base, one sequence at a time."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.encode import IGNORED, encode_prompt
from lofit_fast.evaluation.logprobs import keeping, labelled_log_probs
from tests.library_versions import takes_masks
from tests.oracle import randomize
from tests.ordinary_sample import crossed
from tests.tiny_models import FAMILIES, spread, tiny_model, tokens
from tests.tiny_tokenizers import VOCABULARY, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = {
    "prompt": ["Q: ab? A:", "Q: ab? A:", "Q: who is it? A:", "x"],
    "chosen": [" yes", " yes", " Ann of Rome", "y</s>"],
    "rejected": [" no", " perhaps", " Bo", "zz"],
}


def data_set(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


@torch.no_grad()
def log_p(model, prompt, answer):
    """log p(answer, end | prompt) from full logits of one sequence."""
    start = encode_prompt(TOKENIZER, prompt)
    end = [VOCABULARY[c] for c in answer.removesuffix("</s>")] + [2]
    rows = model(torch.tensor([start + end]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(rows[len(start) - 1 + i, token] for i, token in enumerate(end)).item()


# in the ordinary run each family in batches of one size; slow: of both
@pytest.mark.parametrize("family, batch_size", crossed(FAMILIES, [3, 1]))
def test_reference_equals_an_untouched_copy(family, batch_size):
    model, copy = spread(tiny_model(family)), spread(tiny_model(family))
    handle = lf.patch(model, lf.LofitConfig(scale="all", offset=[(0, 1), (2, 3)]))
    randomize(handle, std=1.0)
    done = lf.reference_logprobs(handle, data_set(ROWS), TOKENIZER, batch_size=batch_size)
    for side in ("chosen", "rejected"):
        expected = [log_p(copy, p, a) for p, a in zip(ROWS["prompt"], ROWS[side], strict=True)]
        active = [log_p(model, p, a) for p, a in zip(ROWS["prompt"], ROWS[side], strict=True)]
        got = torch.tensor(done[f"ref_{side}_logps"], dtype=torch.float64)
        assert (got - torch.tensor(active, dtype=torch.float64)).abs().min() > 1e-2
        assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-4
    assert handle.scopes.plain and not any(layer.here.off for layer in handle.layers.values())


def test_reference_columns(llama):
    handle = lf.patch(llama.train(), lf.LofitConfig(scale="all"))
    # what is there already is replaced
    given = data_set(ROWS | {"ref_chosen_logps": [0.0] * 4, "note": list("abcd")})
    done = lf.reference_logprobs(handle, given, TOKENIZER)
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert set(done.column_names) == {*ROWS, "note", *ids, "ref_chosen_logps", "ref_rejected_logps"}
    assert done["note"] == list("abcd")
    assert done["prompt_ids"][3] == [1, VOCABULARY["x"]]
    # one end-of-sequence token, whether the text brought one or not
    assert done["chosen_ids"][3] == [VOCABULARY["y"], 2]
    assert done["rejected_ids"][3] == [VOCABULARY["z"]] * 2 + [2]
    assert done["ref_chosen_logps"][0] == done["ref_chosen_logps"][1] < 0
    assert llama.training


def test_reference_errors(llama):
    handle = lf.patch(llama, lf.LofitConfig(scale="all"))

    def of(**columns):
        return lf.reference_logprobs(handle, data_set(ROWS | columns), TOKENIZER, max_length=20)

    with pytest.raises(ValueError, match=r"columns prompt, chosen, rejected, got \['prompt', 'rejected'\]"):
        lf.reference_logprobs(handle, data_set(ROWS).remove_columns("chosen"), TOKENIZER)
    with pytest.raises(ValueError, match="texts in the column chosen, got list"):
        of(chosen=[[{"role": "assistant", "content": "a"}]] * 4)
    with pytest.raises(ValueError, match="tokens long, the limit is 20"):
        of()
    with pytest.raises(ValueError, match="completion must hold some text"):
        of(prompt=["a"] * 4, chosen=["</s>"] * 4)
    with pytest.raises(ValueError, match="row 3: chosen and rejected have the same tokens"):
        of(prompt=["a"] * 4, chosen=["b", "b", "c", "b"], rejected=["c", "c", "c</s>", "c"])
    handle.unpatch()
    with pytest.raises(ValueError, match="has ended"):
        of(prompt=["a"] * 4)


@pytest.mark.parametrize("logits", [pytest.param("rows", marks=takes_masks), "columns", "all"])
def test_labelled_log_probs_in_their_places(llama, logits):
    ids = tokens(2, 7)
    labels = ids.masked_fill(torch.tensor([[1, 1, 1, 0, 0, 0, 1], [0, 1, 0, 1, 1, 1, 1]]).bool(), IGNORED)
    got = labelled_log_probs(llama(ids, **keeping(labels, logits)), labels, logits)
    every = llama(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    expected = torch.where(labels[:, 1:] != IGNORED, every, 0.0)
    assert (got - expected).abs().max() <= 1e-6
    assert ((got != 0) == (labels[:, 1:] != IGNORED)).all()
