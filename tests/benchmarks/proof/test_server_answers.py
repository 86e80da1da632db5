"""What `make verify-llamacpp` computes on this side of the server."""

import sys

import numpy as np
import pytest
import torch

import lofit_fast as lf
from benchmarks.proof import server_answers
from benchmarks.proof.server_answers import PLACES, QUESTIONS, SCRIPTS, TARGETS, compared, offsets, ours
from tests.tiny_models import tiny_model

# of two lengths, in no order
IDS = [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]


@torch.no_grad()
def test_ours_is_each_prompt_alone():
    model = tiny_model("llama")
    seen = ours(model, IDS, 3)
    for row, ids in enumerate(IDS):
        answer = []
        for _ in range(3):
            logits = model(torch.tensor([ids + answer])).logits[0, -1]
            if not answer:
                np.testing.assert_allclose(seen["logits"][row], logits.numpy(), atol=1e-6)
            answer.append(int(logits.argmax()))
        assert seen["greedy"][row].tolist() == answer


def test_what_is_compared():
    want = {"logits": np.array([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]]), "greedy": np.array([[2, 1], [0, 0]])}
    got = {"logits": want["logits"] + [[0, 0.5, 0], [0, 0, 0]], "greedy": np.array([[2, 0], [0, 0]])}
    seen = compared(got, want)
    assert seen["top1_agreement"] == 1
    assert seen["greedy_answers_equal"] == 0.5
    assert (seen["largest_logit_difference"], seen["largest_logit"]) == (0.5, 3)
    chosen = torch.tensor(want["logits"]).log_softmax(1)[[0, 1], [2, 0]].numpy()
    seen = compared({"greedy": want["greedy"], "logprob": chosen + [0, 0.25]}, want)
    assert seen["largest_logprob_difference"] == pytest.approx(0.25)


def test_the_adapter_and_the_prompts():
    model = tiny_model("llama")
    handle = offsets(model)
    assert handle is lf.handle_of(model)
    assert [layer.heads("offset") for layer in handle.layers.values()] == [[0, 3], [1], [2]]
    assert len({question.format(place) for place in PLACES for question in QUESTIONS}) == 200
    for target in TARGETS.values():
        assert (SCRIPTS / target.script).is_file()


def test_a_server_that_fails_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"llama_cpp_answers\.py failed with exit code 1"):
        server_answers._answers(sys.executable, "llama_cpp_answers.py", tmp_path / "model.gguf", tmp_path)
