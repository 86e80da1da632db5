"""LoReFT: its equation, and that it edits prompt positions and no others, wherever the prompt's end has to be found."""

import pytest
import torch

from benchmarks.peers import loreft
from benchmarks.peers.positions import prompt_edges
from lofit_fast.cpu.attention import GROUPED, register
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import PackedCollator
from lofit_fast.evaluation import choices as scoring
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.training import CompletionCollator
from tests.benchmarks.peers.edited import logits, right_padded, shake
from tests.library_versions import takes_masks
from tests.tiny_models import HIDDEN, LAYERS, tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer

RANK = 3


def edited(seed=2, positions=2, **options):
    model = tiny_model("llama", torch.float64)
    attachment = loreft.make(model, rank=RANK, positions=positions, **options)
    signs = [edit.rotation.parametrizations.weight.original.diagonal().clone() for _, edit in attachment.hosts]
    shake(attachment, seed=seed)
    for (_, edit), sign in zip(attachment.hosts, signs, strict=True):
        # no gradient ever reaches these
        edit.rotation.parametrizations.weight.original.detach().diagonal().copy_(sign)
    return model, attachment


def by_hand(model, source, positions):
    """The same edits on an untouched model, at given (row, position) pairs."""
    rows, columns = zip(*positions, strict=True)
    for layer, edited_layer in zip(model.model.layers, source.model.layers, strict=True):
        edit = edited_layer.peer
        rotation, w, b = edit.rotation.weight.detach(), edit.source.weight.detach(), edit.source.bias.detach()
        assert (rotation @ rotation.T - torch.eye(RANK)).abs().max() <= 1e-12

        def hook(_, __, h, rotation=rotation, w=w, b=b):
            h = h.clone()
            for row, column in zip(rows, columns, strict=True):
                x = h[row, column].clone()
                h[row, column] = x + rotation.T @ (w @ x + b - rotation @ x)
            return h

        layer.register_forward_hook(hook)
    return model


def test_loreft_is_its_equation_at_prompt_positions():
    model, _ = edited()
    batch = right_padded(prompts=(5, 3), answers=(2, 6))
    plain = by_hand(tiny_model("llama", torch.float64), model, [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2)])
    assert (logits(model, **batch) - logits(plain, **batch)).abs().max() <= 1e-12
    untouched = tiny_model("llama", torch.float64)
    assert (logits(model, **batch) - logits(untouched, **batch)).abs().max() > 1e-3


def test_loreft_refuses_a_batch_with_a_shared_beginning():
    model, _ = edited()
    register()
    model.set_attn_implementation(GROUPED)
    rows = [{"input_ids": [5, 6, 7, last], "labels": [IGNORED, IGNORED, IGNORED, last]} for last in (8, 9)]
    with pytest.raises(ValueError, match="train without packing"):
        model(**PackedCollator(0)(rows), use_cache=False)


@takes_masks
def test_loreft_trains_on_batches_that_compute_few_logits():
    model, _ = edited()
    batch = right_padded(prompts=(5, 3), answers=(2, 6))
    rows = []
    for ids, labels, mask in zip(*(batch[k] for k in ("input_ids", "labels", "attention_mask")), strict=True):
        rows.append({"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()})
    # the edit reads the mask, and no index
    few = CompletionCollator(0)(rows)
    with torch.no_grad():
        loss = model(**few, use_cache=False).loss
        full = model(**batch, use_cache=False).loss
        # without labels, what is kept tells the same
        kept = model(**{k: few[k] for k in ("input_ids", "attention_mask", "logits_to_keep")}, use_cache=False).logits
    # the model computes its loss in float32
    assert abs(loss - full) <= 1e-6
    assert torch.equal(kept, model(**few, use_cache=False).logits)


def test_loreft_edits_no_generated_token():
    model, _ = edited(positions=1)
    prompts = ["ab", "a longer one", "x"]
    tokenizer = tiny_tokenizer()
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        prompt_length = len(ids)
        plain = by_hand(tiny_model("llama", torch.float64), model, [(0, n) for n in {0, prompt_length - 1}])
        while len(ids) < prompt_length + 5 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(logits(plain, input_ids=torch.tensor([ids]))[0, -1].argmax()))
        assert tokenizer.decode(ids[prompt_length:], skip_special_tokens=True) == answer
    assert all(answers)


@pytest.mark.parametrize("packed", [True, False])
def test_loreft_scores_choices_after_the_prompt(packed, monkeypatch):
    model, _ = edited(positions=1)
    tokenizer = tiny_tokenizer()
    prompts, choices = ["ab", "a longer one"], ["yes", "no", "nope", "n"]
    if not packed:
        # as for a model that takes no mask of our own
        monkeypatch.setattr(scoring, "packing_refusal", lambda _: "asked")
    scores = scoring.score_choices(model, tokenizer, prompts, [choices] * 2)
    for row, prompt in enumerate(prompts):
        start = tokenizer(prompt)["input_ids"]
        plain = by_hand(tiny_model("llama", torch.float64), model, [(0, 0), (0, len(start) - 1)])
        for column, choice in enumerate(choices):
            ids = start + tokenizer(choice, add_special_tokens=False)["input_ids"]
            log_p = logits(plain, input_ids=torch.tensor([ids]))[0].log_softmax(-1)
            expected = sum(log_p[n - 1, ids[n]] for n in range(len(start), len(ids)))
            assert scores[row][column].item() == pytest.approx(expected.item(), rel=1e-6)


def test_loreft_positions():
    ids = tokens(2, 6)
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = prompt_edges({"input_ids": ids, "attention_mask": left}, 1, 2)
    assert mask.int().tolist() == [[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1]]
    labels = torch.full_like(ids, IGNORED)
    labels[0, 5] = 7
    mask = prompt_edges({"input_ids": ids, "attention_mask": left, "labels": labels}, 1, 1)
    assert mask.int().tolist() == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]]
    mask = prompt_edges({"input_ids": ids, "logits_to_keep": 3}, 1, 1)
    assert mask.int().tolist() == [[1, 0, 0, 1, 0, 0]] * 2
    with pytest.raises(ValueError, match="packed"):
        prompt_edges({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])}, 1, 1)


def test_loreft_counts_its_matrices_and_checks_its_rank(llama):
    assert loreft.make(llama, rank=RANK).n_parameters() == LAYERS * RANK * (2 * HIDDEN + 1)
    with pytest.raises(ValueError, match="rank"):
        loreft.make(tiny_model("llama"), rank=HIDDEN + 1)


def test_loreft_edits_the_chosen_layers(llama):
    assert loreft.make(llama, layers=[1], rank=2).n_parameters() == 2 * (2 * HIDDEN + 1)
    assert not hasattr(llama.model.layers[0], "peer")
